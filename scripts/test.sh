#!/usr/bin/env bash
# Environment, lint, types, all tests. Arguments go to pytest: scripts/test.sh -k header
# PYTHON chooses the interpreter (the pins are for 3.11).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" scripts/environments.py project)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" -m pytest --numprocesses 2 "$@"
