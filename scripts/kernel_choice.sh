#!/usr/bin/env bash
# Which kernel released engines choose for an FP8 layer on a GPU that is not here, and whether it takes the layer: runs
# their own choice with the platform mocked.
#
#   scripts/kernel_choice.sh                                    everything (half an hour; environments of the loader matrix)
#   scripts/kernel_choice.sh --engine sglang==0.5.17 --platform sm90
#   scripts/kernel_choice.sh --record                           also writes tests/kernel_choice.json
#   scripts/kernel_choice.sh --ci                               a few; exit 1 where one differs from the record
#   scripts/kernel_choice.sh --readme                           only prints the table of rewrite/loaders/README.md
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=scripts PYTHONDONTWRITEBYTECODE=1 exec "${PYTHON:-python3}" -m kernel_choice "$@"
