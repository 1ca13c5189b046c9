"""Runs the real weight loading code of released engines over the fixtures, and records what they serve."""
