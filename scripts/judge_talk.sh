#!/usr/bin/env bash
# lm-evaluation-harness on the checkpoint that talks: as meant, as vLLM 0.19.1 serves it, converted.
#
#   scripts/judge_talk.sh            prints JSON
#   scripts/judge_talk.sh --record   also writes tests/talk/judged.json
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11. pip must find a CPU build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
project=$("${PYTHON:-python3.11}" scripts/environments.py project)
judge=$("${PYTHON:-python3.11}" scripts/environments.py judge)
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=scripts:. CUDA_VISIBLE_DEVICES=

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
in=tests/talk/talk-fp8
"$project" -m talk.export "$in" "vLLM 0.19.1" "$work/original as vLLM 0.19.1 serves it" 2> "$work/log"
for profile in exact dynamic; do
  "$project" -m rewrite convert --quiet --profile "$profile" "$in" "$work/$profile"
done
ln -s "$PWD/$in" "$work/original"
found=$("$judge" -m talk.judge "$work/original" "$work/original as vLLM 0.19.1 serves it" "$work/exact" \
  "$work/dynamic" 2> "$work/log")
if [[ ${1:-} == --record ]]; then
  echo "$found" > tests/talk/judged.json
fi
echo "$found"
