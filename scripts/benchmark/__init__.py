"""How long `rewrite` takes beside `cp -r`, safetensors and compressed-tensors. Run by scripts/benchmark.sh."""
