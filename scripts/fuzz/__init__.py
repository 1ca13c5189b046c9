"""Fuzzing of what reads checkpoints. Run by scripts/fuzz.sh."""
