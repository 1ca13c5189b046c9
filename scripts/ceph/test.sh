#!/usr/bin/env bash
# Runs the tests of S3 against Ceph's gateway, the one server at hand that is no imitation. Needs root, Debian 12 and its
# package archive. Ceph is installed over a copy of the root filesystem in memory, in namespaces of its own: nothing stays.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" = 0 ] || { echo "scripts/ceph/test.sh needs root" >&2; exit 2; }
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
mkdir "$root/ceph"
mount -t tmpfs tmpfs "$root/ceph"
cp scripts/ceph/{ceph.conf,start.sh} "$root/ceph"
printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d" # no service starts by itself
chmod +x "$root/usr/sbin/policy-rc.d"
echo "Installing Ceph ..." >&2
DEBIAN_FRONTEND=noninteractive chroot "$root" sh -c 'apt-get update -qq && apt-get install -y -qq \
    --no-install-recommends ceph-mon ceph-osd radosgw ceph-common' > "$work/install.log" 2>&1 ||
    { tail -20 "$work/install.log" >&2; exit 1; }
chroot "$root" bash /ceph/start.sh > "$work/ceph.log" 2>&1 &
for _ in $(seq 120); do [ -e "$root/ceph/ready" ] && break; sleep 1; done
[ -e "$root/ceph/ready" ] || { tail -20 "$work/ceph.log" >&2; exit 1; }
export REWRITE_S3_ENDPOINT=http://127.0.0.1:7480 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=testtest
export HF_HUB_OFFLINE=1
"$python" -m pytest -q -rA tests/integrations/test_s3_server.py "$@"
