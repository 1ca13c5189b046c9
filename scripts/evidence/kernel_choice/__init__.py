"""Runs the engines' own choice of FP8 kernels with the platform mocked, and records what they choose."""
