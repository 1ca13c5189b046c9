#!/usr/bin/env bash
# How long `rewrite convert` takes beside `cp -r`, safetensors and compressed-tensors, what many
# tensors cost, and how long verifying takes.
#
#   scripts/benchmark.sh                            4 GB, 5 rounds, in the folder for temporary files
#   scripts/benchmark.sh --dir DIR                  on another filesystem; needs twice the size and some
#   scripts/benchmark.sh --size-gb 8 --rounds 3 --warm
#   scripts/benchmark.sh --filesystems              ext4, XFS and Btrfs in images on loop devices; root, four times the size
#   scripts/benchmark.sh --tensors                  inspect and convert --dry-run of 100,000 to 500,000 tensors beside safe_open
#   scripts/benchmark.sh --rescaling                NVFP4 layers that get one global scale, instead
#   scripts/benchmark.sh --verify                   verify beside cmp and sha256sum, instead; four times the size
#   scripts/benchmark.sh --remote                   bytes over the network for the hub and S3, instead; four times the size
#   scripts/benchmark.sh --python ENV/bin/python    with an environment of yours that has all it takes
#
# Cold caches need root (/proc/sys/vm/drop_caches); without it the run is warm, and says so.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=
arguments=()
while (($#)); do
  case $1 in
    --python) python=${2:?"--python needs an interpreter"}; shift 2 ;;
    *) arguments+=("$1"); shift ;;
  esac
done

[[ -n $python ]] || python=$("${PYTHON:-python3}" "$root/scripts/environments.py" project)

# The modules are imported from the checkout; rewrite too, so that an environment of yours need not have it.
export PYTHONPATH=$root/scripts:$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m benchmark "${arguments[@]}"
