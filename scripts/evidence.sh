#!/usr/bin/env bash
# What the tests rest on: records of what engines do, and checkpoints of real producers. README.md of scripts/evidence.
#
#   scripts/evidence.sh NAME [OPTION ...]      --help after a name says more
#
# Released engines, on a CPU: their own code runs, records are written with --record
#   loader_matrix     what they load of the fixtures, original and converted (10 GB under .cache/loaders, ten minutes)
#                     --engine vllm==0.19.1 --fixture llmcompressor-qwen3_5-vl; --ci: a few cells, exit 1 where one differs
#   search N          N random checkpoints through the engines; exit 1 where one serves something else than predicted
#   outputs           what NVFP4 layers compute in vLLM's emulation
#   talk              what a model that talks says in vLLM
#   logits            logits of the NVFP4 fixtures as served (transformers)
#   kernel_choice     which kernel they choose for an FP8 layer on a GPU that is not here (half an hour; --ci: a few)
#   other_consumers   what llama.cpp's converter and MLX-LM read
#   try_families      what engines make of the checkpoints of `families`, and whether the predictions say the same
#   atlas             which layers they fuse in each model, read from their source; nothing is run (a minute)
#   judge             lm-evaluation-harness on the model that talks; --backend vllm: through vLLM
#
# Checkpoints
#   fixtures          tests/fixtures, by llm-compressor and ModelOpt
#   families          small checkpoints of every family of the atlas that transformers has a class for, in all forms
#   make_talk         tests/talk: trains the small model (Debian's bible-kjv and bible-kjv-text), quantizes it
#   zoo PRODUCER      tests/zoo/entries; PYTHON has the producer
#
# PYTHON chooses the interpreter; the pinned wheels are for CPython 3.11. pip must find CPU builds of torch.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
name=${1:-}
shift || true
export PYTHONPATH=$root/scripts:$root/scripts/evidence:$root PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false CUDA_VISIBLE_DEVICES=

environment() { "$python" "$root/scripts/environments.py" "$1"; }

make_talk() {
  "$(environment project)" -m talk.train "$work"
  "$(environment fixtures)" -m talk.quantize "$work" "$root/tests/talk"
}

judge() {
  local backend=hf record= in=$root/tests/talk/talk-fp8 out=judged.json project
  while (($#)); do
    case $1 in
      --record) record=yes ;;
      --backend) backend=${2:-} && shift ;;
      *) backend= ;;
    esac
    shift || true
  done
  if [[ $backend != hf && $backend != vllm ]]; then
    echo "usage: scripts/evidence.sh judge [--backend hf|vllm] [--record]" >&2
    exit 2
  fi
  project=$(environment project)
  ln -s "$in" "$work/original"
  "$project" -m rewrite convert --quiet --profile dynamic "$in" "$work/dynamic"
  if [[ $backend == vllm ]]; then
    "$project" -m talk.vllm_backend "$work/original" "$work/dynamic" > "$work/found"
    out=judged_vllm.json
  else
    "$project" -m talk.export "$in" "vLLM 0.19.1" "$work/original as vLLM 0.19.1 serves it" 2> "$work/log"
    "$project" -m rewrite convert --quiet --profile exact "$in" "$work/exact"
    "$(environment judge)" -m talk.judge "$work/original" "$work/original as vLLM 0.19.1 serves it" "$work/exact" \
      "$work/dynamic" > "$work/found" 2> "$work/log"
  fi
  [[ -z $record ]] || cp "$work/found" "$root/tests/talk/$out"
  cat "$work/found"
}

case $name in
  loader_matrix) exec "$(environment project)" -m loader_matrix.matrix "$@" ;;
  search | outputs | talk | logits) exec "$(environment project)" -m "loader_matrix.$name" "$@" ;;
  atlas | families | kernel_choice | other_consumers | try_families) exec "$(environment project)" -m "$name" "$@" ;;
  zoo) exec "$python" -m zoo "$@" ;;
  fixtures) exec "$(environment fixtures)" -m "$name" "$@" ;;
  make_talk | judge)
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$name" "$@"
    ;;
  *)
    sed -n '/^#   /s/^# //p' "${BASH_SOURCE[0]}" >&2
    exit 2
    ;;
esac
