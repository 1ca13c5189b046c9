#!/usr/bin/env bash
# Sourced by scripts that try Debian's packages: a copy of the root filesystem in memory, in namespaces of its own, so that
# nothing stays on the machine. Needs root, Debian 12 and its package archive.
#     . scripts/overlay.sh
#     enter_namespaces "$0" "$@"    # starts the script again, in them
#     make_root PACKAGE...          # $root: the copy with these packages, none of whose services was started

enter_namespaces() {
    [ "$(id -u)" = 0 ] || { echo "$1 needs root" >&2; exit 2; }
    [ -n "${IN_NAMESPACE:-}" ] || IN_NAMESPACE=1 exec unshare --mount --pid --fork --kill-child "$@"
}

make_root() {
    local work
    work=$(mktemp -d)
    mount -t tmpfs tmpfs "$work"
    mkdir "$work"/{upper,work,root}
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/work" "$work/root"
    root=$work/root
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --rbind /sys "$root/sys"
    printf '#!/bin/sh\nexit 101\n' > "$root/usr/sbin/policy-rc.d"
    chmod +x "$root/usr/sbin/policy-rc.d"
    echo "Installing $* ..." >&2
    DEBIAN_FRONTEND=noninteractive chroot "$root" sh -c 'apt-get update -qq && apt-get install -y -qq \
        --no-install-recommends "$@"' sh "$@" > "$work/install.log" 2>&1 || { tail -20 "$work/install.log" >&2; exit 1; }
}
