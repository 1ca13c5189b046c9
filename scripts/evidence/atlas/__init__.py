"""Which layers engines fuse, family by family, read from the engines' own source: README.md."""
