#!/usr/bin/env bash
# Coverage-guided fuzzing (atheris) and crafted cases. Stops at the first find and leaves the input in .cache/fuzz.
#
#   scripts/fuzz.sh                     a million header files, 100,000 checkpoints, 10,000 crafted cases
#   scripts/fuzz.sh 60                  60 seconds of each target, 1,000 crafted cases
#   scripts/fuzz.sh 60 -seed=1          more options for libFuzzer
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-}
shift || true

python=$("${PYTHON:-python3}" scripts/environments.py project)
export PYTHONPATH=$PWD/scripts:$PWD

mkdir -p .cache/fuzz
"$python" -m fuzz.seeds .cache/fuzz
fuzz() { # target, runs, options
  local target=$1 budget=-runs=$2
  shift 2
  [[ -z $seconds ]] || budget=-max_total_time=$seconds
  "$python" -m "fuzz.$target" "$budget" -timeout=20 -rss_limit_mb=400 -print_final_stats=1 \
    -artifact_prefix=.cache/fuzz/ "$@" ".cache/fuzz/$target"
}
fuzz header 1000000 -max_len=2048 "$@"
fuzz checkpoint 100000 -max_len=12000 "$@"
"$python" -m fuzz.crafted 0 "$([[ -n $seconds ]] && echo 1000 || echo 10000)"
