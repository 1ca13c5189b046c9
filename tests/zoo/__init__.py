"""Checkpoints of many producers and recipes, stripped, and what rewrite makes of them."""
