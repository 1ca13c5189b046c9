#!/usr/bin/env bash
# The main job on a real checkpoint: convert it, show what changed, prove that the model still computes the same.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh test

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH=$venv/bin:$PATH
in=tests/fixtures/llmcompressor-qwen3_5-vl
out=$work/converted

echo "\$ rewrite convert $in OUT"
rewrite convert "$in" "$out" | sed "s|$out|OUT|"
echo
python scripts/demo.py "$in" "$out"
