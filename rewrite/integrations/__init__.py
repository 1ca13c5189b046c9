"""Doors to other projects, each imported only where it is used."""
