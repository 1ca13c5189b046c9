#!/usr/bin/env bash
# Environment, lint, types, all tests. Arguments go to pytest: scripts/test.sh -k header
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test,lint

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest --numprocesses 2 "$@"
