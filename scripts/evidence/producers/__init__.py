"""Tiny base models, and the calls by which real producers quantize them: of the fixtures and of the zoo."""
