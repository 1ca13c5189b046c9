"""Servers for tests: a hub that is small, and one that misbehaves when it is told to."""
