#!/usr/bin/env bash
# Runs slurm.sh with the SLURM of Debian 12, two slurmd on this host: as it is; with a part that is requeued while it
# writes; with one that is killed. Needs root: see scripts/overlay.sh.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
. scripts/overlay.sh
enter_namespaces "$PWD/scripts/cluster/test.sh" "$@"
python=$("${PYTHON:-python3}" scripts/environments.py project)
make_root slurmd slurmctld munge slurm-client
mkdir "$root/slurm"
mount -t tmpfs tmpfs "$root/slurm"
cp scripts/cluster/slurm.conf "$root/etc/slurm"
exec chroot "$root" bash "$PWD/scripts/cluster/inside.sh" "$PWD" "$python"
