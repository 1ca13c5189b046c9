#!/usr/bin/env bash
# Environment, lint, types, all tests. Arguments go to pytest: scripts/test.sh -k header
# PYTHON chooses the interpreter (the pins are for 3.11).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" scripts/environments.py project)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=1 # of each of the two processes: tensors are small, and threads that wait for the other core spin
unset PYTHONDONTWRITEBYTECODE # tests start hundreds of processes: each would compile all of it again

"$python" -m ruff check .
"$python" -m ruff format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$python" -m mypy > "$types" 2>&1 & # beside the tests: it keeps one core busy for a minute
mypy=$!
tests=0
"$python" -m pytest --numprocesses 2 "$@" || tests=$?
wait "$mypy" || { cat "$types"; exit 1; }
tail -1 "$types"
exit "$tests"
