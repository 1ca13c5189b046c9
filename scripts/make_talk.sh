#!/usr/bin/env bash
# Rebuild the checkpoints under tests/talk: train the small model, quantize it with llm-compressor. 30 minutes on a CPU.
#
# It needs the program and the text of Debian's packages bible-kjv and bible-kjv-text, and what make_fixtures.sh needs.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$("${PYTHON:-python3.11}" scripts/environments.py project)
producers=$("${PYTHON:-python3.11}" scripts/environments.py fixtures)
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES= PYTHONPATH=scripts

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$project" -m talk.train "$work"
"$producers" -m talk.quantize "$work" tests/talk
