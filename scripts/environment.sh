# Sourced by the other scripts: makes .venv with the project, its pinned dependencies and the extras asked for.
#
#   . scripts/environment.sh test,lint     afterwards $venv/bin/python has them
#
# PYTHON chooses the interpreter (3.10 or newer; the pins are for 3.11). Installs only when a pin or the project's own
# pyproject.toml has changed since the last time.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extras=$1

stamp=$(cat "$root/scripts/constraints.txt" "$root/pyproject.toml" | sha256sum | cut -c1-16)-$extras
if [[ ! -f $venv/ready-$stamp ]]; then
  echo "Setting up .venv (once; the download is mostly torch) ..." >&2
  [[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
  # torch first and by its exact version: a range lets pip take a build with gigabytes of GPU libraries.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/scripts/constraints.txt")"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$root/scripts/constraints.txt" --editable "$root[$extras]"
  touch "$venv/ready-$stamp"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
