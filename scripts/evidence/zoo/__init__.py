"""Makes the zoo: small checkpoints of many producers and recipes, stripped to what a test needs. See README.md."""
