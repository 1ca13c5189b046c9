#!/usr/bin/env bash
# Rebuild the checkpoints under tests/fixtures with the real producers, on CPU, from pinned versions.
#
#   scripts/make_fixtures.sh                        all of them
#   scripts/make_fixtures.sh modelopt-qwen3_5-vl    one of them
#   scripts/make_fixtures.sh --out some/folder      elsewhere, to compare
#
# PYTHON chooses the interpreter (default python3.11, which the pinned versions are for). On Linux pip must know
# PyTorch's CPU index, for example through PIP_EXTRA_INDEX_URL; the environment takes about 2 GB of disk.
set -euo pipefail

# --out is relative to where the caller stands, so the script does not change folder.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$("${PYTHON:-python3.11}" "$root/scripts/environments.py" fixtures)

# Nothing is looked up on a hub and no accelerator is used, so that every machine builds the same.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
PYTHONPATH=$root/scripts exec "$python" -m fixtures "$@"
