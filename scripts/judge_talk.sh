#!/usr/bin/env bash
# lm-evaluation-harness on the checkpoint that talks: as meant, as vLLM 0.19.1 serves it, converted.
#
#   scripts/judge_talk.sh                   prints JSON
#   scripts/judge_talk.sh --record          also writes tests/talk/judged.json
#   scripts/judge_talk.sh --backend vllm    through vLLM 0.19.1 and 0.32.0 on CPU instead of transformers: original and
#                                           dynamic (5 GB under .cache/loaders); --record: judged_vllm.json
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11. pip must find a CPU build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
backend=hf record=
while (($#)); do
  case $1 in
    --record) record=yes ;;
    --backend) backend=${2:-} && shift ;;
    *) backend= ;;
  esac
  shift || true
done
if [[ $backend != hf && $backend != vllm ]]; then
  echo "usage: scripts/judge_talk.sh [--backend hf|vllm] [--record]" >&2
  exit 2
fi
python=${PYTHON:-python3.11}
project=$("$python" scripts/environments.py project)
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=scripts:. CUDA_VISIBLE_DEVICES=

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
in=tests/talk/talk-fp8
ln -s "$PWD/$in" "$work/original"
if [[ $backend == vllm ]]; then
  "$project" -m rewrite convert --quiet --profile dynamic "$in" "$work/dynamic"
  PYTHONDONTWRITEBYTECODE=1 "$python" -m talk.vllm_backend "$work/original" "$work/dynamic" > "$work/found"
  out=judged_vllm.json
else
  judge=$("$python" scripts/environments.py judge)
  "$project" -m talk.export "$in" "vLLM 0.19.1" "$work/original as vLLM 0.19.1 serves it" 2> "$work/log"
  for profile in exact dynamic; do
    "$project" -m rewrite convert --quiet --profile "$profile" "$in" "$work/$profile"
  done
  "$judge" -m talk.judge "$work/original" "$work/original as vLLM 0.19.1 serves it" "$work/exact" \
    "$work/dynamic" > "$work/found" 2> "$work/log"
  out=judged.json
fi
if [[ $record ]]; then
  cp "$work/found" "tests/talk/$out"
fi
cat "$work/found"
