#!/usr/bin/env bash
# Runs slurm.sh with the SLURM of Debian 12, two slurmd on this host: as it is; with a part that is requeued while it
# writes; with one that is killed. Needs root and the package archive. SLURM is installed over a copy of the root
# filesystem in memory, in namespaces of its own: nothing stays.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "scripts/cluster/test.sh needs root" >&2; exit 2; }
if [ -z "${IN_NAMESPACE:-}" ]; then
    IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child "$0" "$@"
fi
python=$("${PYTHON:-python3}" scripts/environments.py project)
work=$(mktemp -d)
mount -t tmpfs tmpfs "$work"
mkdir "$work"/{upper,work,root}
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root"
root=$work/root
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mkdir -p "$root/slurm" "$root/etc/slurm"
mount -t tmpfs tmpfs "$root/slurm"
cp scripts/cluster/slurm.conf "$root/etc/slurm"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d" # no service starts by itself
chmod +x "$root/usr/sbin/policy-rc.d"
echo "Installing SLURM ..." >&2
DEBIAN_FRONTEND=noninteractive chroot "$root" sh -c 'apt-get update -qq && apt-get install -y -qq \
    --no-install-recommends slurmd slurmctld munge slurm-client' > "$work/install.log" 2>&1 ||
    { tail -20 "$work/install.log" >&2; exit 1; }
exec chroot "$root" bash "$PWD/scripts/cluster/inside.sh" "$PWD" "$python"
