#!/usr/bin/env bash
# Runs the tests of S3 against Ceph's gateway, the one server at hand that is no imitation. Needs root: see
# scripts/overlay.sh.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
. scripts/overlay.sh
enter_namespaces "$PWD/scripts/ceph/test.sh" "$@"
python=$("${PYTHON:-python3}" scripts/environments.py project)
make_root ceph-mon ceph-osd radosgw ceph-common
mkdir "$root/ceph"
mount -t tmpfs tmpfs "$root/ceph"
cp scripts/ceph/{ceph.conf,start.sh} "$root/ceph"
chroot "$root" bash /ceph/start.sh > "$root/ceph/start.log" 2>&1 &
for _ in $(seq 240); do [ -e "$root/ceph/ready" ] && break; sleep 1; done
[ -e "$root/ceph/ready" ] || { tail -20 "$root/ceph/start.log" >&2; exit 1; }
export REWRITE_S3_ENDPOINT=http://127.0.0.1:7480 AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=testtest
export HF_HUB_OFFLINE=1
"$python" -m pytest -q -rA tests/integrations/test_s3_server.py "$@"
