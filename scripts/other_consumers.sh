#!/usr/bin/env bash
# What others than vLLM, SGLang and transformers make of the fixtures, original and converted: runs llama.cpp's converter
# and the loading code of MLX-LM on CPU.
#
#   scripts/other_consumers.sh                              everything
#   scripts/other_consumers.sh --consumer llama.cpp --fixture llmcompressor-llama
#   scripts/other_consumers.sh --record                     also writes tests/other_consumers.json
#   scripts/other_consumers.sh --readme                     only prints the table of rewrite/loaders/README.md
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" scripts/environments.py project)
PYTHONPATH=scripts:. PYTHONDONTWRITEBYTECODE=1 exec "$python" -m other_consumers "$@"
