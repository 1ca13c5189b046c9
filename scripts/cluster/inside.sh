#!/bin/bash
# Inside the chroot: starts SLURM in /slurm, and runs slurm.sh three times. Called by test.sh.
set -euo pipefail
project=$1 python=$2
cd /slurm
mkdir -p state spool.n1 spool.n2 in /run/munge
chown munge /run/munge
dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
chown munge: /etc/munge/munge.key
chmod 400 /etc/munge/munge.key
su munge -s /bin/sh -c 'munged --foreground > /slurm/munged.out 2>&1' &
sleep 1
slurmctld -D > slurmctld.out 2>&1 &
for node in n1 n2; do slurmd -D -N "$node" > "$node.out" 2>&1 & done
for _ in $(seq 60); do
    [ "$(sinfo -h -t idle -o %D)" = 2 ] && break
    sleep 0.5
done
sinfo -N

PYTHONPATH=$project/scripts:$project "$python" -m benchmark.make /slurm/in 0.1
export REWRITE=$(dirname "$python")/rewrite
"$REWRITE" convert in local --copy --quiet

fail() { echo "FAILED: $*" >&2; tail -n 20 rewrite-*.log >&2; exit 1; }
empty() { # wait until all is done; what was requeued need not wait the two minutes that SLURM gives it
    for _ in $(seq 240); do
        [ -z "$(squeue -h)" ] && return
        for waiting in $(squeue -h -t PD -n rewrite -o %A); do scontrol update "JobId=$waiting" StartTime=now || true; done
        sleep 0.5
    done 2> /dev/null
    squeue >&2
    fail "the queue is not empty"
}
submit() { # NAME: plan and submit; the number of the array in $job
    "$REWRITE" plan in "$1" --copy --output "$1.json" --quiet
    local said
    said=$("$project/scripts/cluster/slurm.sh" "$1.json" 2)
    echo "$said"
    job=${said%%:*}
}
writing() { # NAME PART: wait until that part writes a file
    for _ in $(seq 3000); do
        [ "$(squeue -h -j "${job}_$2" -o %T 2> /dev/null)" = RUNNING ] && compgen -G ".$1.rewrite-*/part-*" > /dev/null &&
            return
        sleep 0.01
    done
    fail "part $2 of $1 was never seen writing"
}
same() { diff -r local "$1" || fail "$1 is not what one process writes"; rm -r "$1"; echo "ok: $2"; }

start=$EPOCHREALTIME
submit plain
empty
same plain "as it is, $("$python" -c "print(f'{$EPOCHREALTIME - $start:.1f} s')")"

submit requeued
writing requeued 0
scontrol requeue "${job}_0"
[ ! -e requeued ] || fail "OUT is there before the last step"
empty
same requeued "a part that is requeued while it writes"

submit killed
writing killed 0
scancel --signal=KILL --full "${job}_0"
empty
[ ! -e killed ] || fail "OUT is there, and a part of it was killed"
"$REWRITE" finish killed.json && fail "finish without a part"
"$REWRITE" run killed.json --part 0/2 --quiet
"$REWRITE" finish killed.json --quiet
same killed "a part that is killed, and run again"
kill $(jobs -p)
