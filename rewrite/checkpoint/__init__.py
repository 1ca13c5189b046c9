"""What lies there: files, safetensors headers, JSON, and the :class:`~rewrite.checkpoint.checkpoint.Checkpoint`.

Nothing here knows what a scale is. Bytes come through the small :class:`~rewrite.checkpoint.storage.Storage` protocol.
"""
