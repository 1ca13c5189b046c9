#!/usr/bin/env bash
# What released engines make of the fixtures, original and converted: runs their own weight loading code on CPU.
#
#   scripts/loader_matrix.sh                                    everything (about ten minutes, 10 GB under .cache/loaders)
#   scripts/loader_matrix.sh --engine vllm==0.19.1 --fixture llmcompressor-qwen3_5-vl
#   scripts/loader_matrix.sh --record                           also writes tests/loader_matrix.json, prints Markdown
#   scripts/loader_matrix.sh --ci                               a few cells; exit 1 where one differs from the record
#   scripts/loader_matrix.sh --readme                           only prints the README's table from the record; its
#                                                               second one: --readme-families
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=scripts PYTHONDONTWRITEBYTECODE=1 exec "${PYTHON:-python3}" -m loader_matrix.matrix "$@"
