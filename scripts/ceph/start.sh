#!/bin/bash
# Inside the chroot: starts Ceph in /ceph, makes a user, says so in /ceph/ready. Called by test.sh.
set -euo pipefail
mkdir -p /ceph/{run,log,mon.a,osd.0,rgw}
export CEPH_CONF=/ceph/ceph.conf
monmaptool --create --clobber --add a 127.0.0.1:6789 --fsid 11111111-2222-3333-4444-555555555555 \
    --enable-all-features /ceph/run/monmap
# On a busy machine the monitor refuses some first commands of a client as of the "wrong fsid", also the one with which an
# OSD begins, which ends then. The next try succeeds.
again() { for _ in $(seq 30); do if "$@"; then return; fi; sleep 1; done; return 1; }
ceph-mon --mkfs -i a --monmap /ceph/run/monmap
ceph-mon -i a -f &
id=$(cat /proc/sys/kernel/random/uuid)
again ceph osd new "$id"
ceph-osd -i 0 --mkfs --osd-uuid "$id"
ceph osd crush add-bucket default root || true
again ceph-osd -i 0 -f &
until ceph osd stat | grep -q '1 up'; do sleep 0.5; done
again radosgw -n client.rgw -f &
until (exec 3<>/dev/tcp/127.0.0.1/7480) 2>/dev/null; do sleep 0.5; done
again radosgw-admin -n client.rgw user create --uid=t --display-name=t --access-key=test --secret-key=testtest
touch /ceph/ready
wait
