#!/usr/bin/env bash
# What released engines make of the fixtures, original and converted: runs their own weight loading code on CPU.
#
#   scripts/loader_matrix.sh                                    everything (about ten minutes, 10 GB under .cache/loaders)
#   scripts/loader_matrix.sh --engine vllm==0.19.1 --fixture llmcompressor-qwen3_5-vl
#   scripts/loader_matrix.sh --record                           also writes tests/loader_matrix.json, prints Markdown
#   scripts/loader_matrix.sh --ci                               a few cells; exit 1 where one differs from the record
#   scripts/loader_matrix.sh --ci --amx --engine vllm==0.32.0   the same as on a CPU with AMX, where vLLM repacks weights
#   scripts/loader_matrix.sh --readme                           only prints the README's table from the record; its
#                                                               second one: --readme-families
#   scripts/loader_matrix.sh --search 50 --seed 0               random checkpoints through the engines; exit 1 where one
#                                                               serves something else than was predicted (--help
#                                                               has more: --survey, --shrink, --no-engine)
#   scripts/loader_matrix.sh --outputs                          what NVFP4 layers compute in vLLM's emulation
#   scripts/loader_matrix.sh --talk                             what a model that talks says in vLLM (--record, --readme)
#   scripts/loader_matrix.sh --logits                           logits of the NVFP4 fixtures as served (transformers)
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ ${1:-} == --search || ${1:-} == --logits ]]; then
  python=$("${PYTHON:-python3}" scripts/environments.py project)
  module=loader_matrix.${1#--}
  shift
  PYTHONPATH=scripts:. PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 exec "$python" -m "$module" "$@"
fi
module=loader_matrix.matrix
if [[ ${1:-} == --outputs || ${1:-} == --talk ]]; then
  module=loader_matrix.${1#--}
  shift
fi
PYTHONPATH=scripts PYTHONDONTWRITEBYTECODE=1 exec "${PYTHON:-python3}" -m "$module" "$@"
