#!/usr/bin/env bash
# Carries out a plan of `rewrite plan` with SLURM: an array of N parts, then the last step.
#     scripts/cluster/slurm.sh PLAN N [sbatch options]
# IN, OUT and PLAN must have the same paths on every node, and `rewrite` must be on its PATH (REWRITE=... names another).
# REWRITE_OUT, where it is set, is the OUT that the plan must have: a plan that replaces its OUT needs it.
# A part that fails or is requeued may run again: scontrol requeue JOB_PART. Logs: rewrite-<job>_<part>.log
set -euo pipefail
plan=$(realpath "$1") parts=$2
shift 2
rewrite=${REWRITE:-rewrite}
run='exec "$0" run "$1" ${REWRITE_OUT:+"$REWRITE_OUT"} --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"'
finish='exec "$0" finish "$1" ${REWRITE_OUT:+"$REWRITE_OUT"}'
job=$(sbatch --parsable --requeue --job-name=rewrite --array=0-$((parts - 1)) --output=rewrite-%A_%a.log "$@" \
    --wrap "bash -c '$run' '$rewrite' '$plan'")
last=$(sbatch --parsable --job-name=rewrite-finish --dependency="afterok:$job" --kill-on-invalid-dep=yes \
    --output=rewrite-%j.log "$@" --wrap "bash -c '$finish' '$rewrite' '$plan'")
echo "$job: $parts parts, $last: finish"
