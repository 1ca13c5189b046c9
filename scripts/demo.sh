#!/usr/bin/env bash
# The main job on a real checkpoint: convert it, show what changed, prove that the model still computes the same.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$("${PYTHON:-python3}" scripts/environments.py project)
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=${python%/*}:$PATH
in=tests/fixtures/llmcompressor-qwen3_5-vl
out=$work/converted

echo "\$ rewrite convert $in OUT"
rewrite convert "$in" "$out" | sed "s|$out|OUT|"
echo
python scripts/demo.py "$in" "$out"

in=tests/talk/talk-fp8
out=$work/talks
echo
echo "\$ rewrite convert $in OUT"
rewrite convert "$in" "$out" | sed "s|$out|OUT|"
echo
PYTHONPATH=scripts/evidence:. python -m talk.demo "$in" "$out"
