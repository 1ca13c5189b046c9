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
venv=$root/.cache/fixtures-venv

if [[ ! -x $venv/bin/python ]]; then
  "${PYTHON:-python3.11}" -m venv "$venv"
fi
# --no-deps: the list is complete (pip check proves it), and a resolver could pull a torch with a GPU runtime.
"$venv/bin/python" -m pip install --quiet --no-deps --requirement "$root/scripts/constraints-fixtures.txt"
"$venv/bin/python" -m pip check

# Nothing is looked up on a hub and no accelerator is used, so that every machine builds the same.
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=
PYTHONPATH=$root/scripts exec "$venv/bin/python" -m fixtures "$@"
