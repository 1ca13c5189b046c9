#!/usr/bin/env bash
# The whole verification on CUDA, with what a GPU image usually has: every fixture, and one fused group at the real
# shapes of Qwen3.5-9B and Qwen3.5-27B. Needs torch, safetensors, click, tqdm and compressed-tensors in $PYTHON's
# environment; WHEELS names a folder with wheels to install the missing ones from (no network is used).
#
#   scripts/gpu_check.sh               on the first GPU
#   scripts/gpu_check.sh --device cpu  the same without one
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps --target .cache/gpu-site "$WHEELS"/*.whl
fi
PYTHONPATH=$PWD:$PWD/.cache/gpu-site exec "$python" scripts/gpu_check.py "$@"
