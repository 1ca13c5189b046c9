"""Plan → directory: one shard or file at a time, staged beside OUT, then renamed into place."""
