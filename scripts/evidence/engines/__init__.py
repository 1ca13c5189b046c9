"""Released engines on a CPU: which there are, their environments, and how one is started and given work."""
