#!/usr/bin/env bash
# The programs that some tests need and no Python package has: Chromium, mkfs.xfs, mkfs.btrfs. Installs those that are not
# there with apt-get; does nothing where that is not possible, and the tests say what they lack.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin

missing=()
command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null ||
  missing+=(chromium)
command -v mkfs.xfs > /dev/null || missing+=(xfsprogs)
command -v mkfs.btrfs > /dev/null || missing+=(btrfs-progs)
if ((${#missing[@]} == 0)); then
  exit 0
fi
if [[ $(id -u) != 0 ]] || ! command -v apt-get > /dev/null; then
  echo "Not installed: ${missing[*]} (this takes root and apt-get). Tests that need them are skipped, or fail where CI is set." >&2
  exit 0
fi
echo "Installing ${missing[*]} ..." >&2
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } > "$log" 2>&1 ||
  { tail -20 "$log" >&2; exit 1; }
