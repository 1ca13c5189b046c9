"""A release that the atlas does not have yet: its Python files, and what it changes for users."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def unpack(spec: str, folder: Path) -> None:
    """The Python files of the wheel of ``NAME==VERSION`` into ``folder``, unless they are there; nothing of it runs."""
    if folder.is_dir():
        return
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", wheels, spec], check=True)
        (wheel,) = Path(wheels).iterdir()
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(folder, [name for name in packed.namelist() if name.endswith(".py")])


def changes(data: Mapping[str, Any], before: str, after: str) -> Iterator[str]:
    """Lines for CHANGELOG.md: models that ``after`` ("vLLM 0.33.0") serves and ``before`` does not, and so on."""
    old, new = ({name: data["models"][i] for name, (i, _) in data["families"][key].items()} for key in (before, after))
    kept = sorted(old.keys() & new.keys())
    layers = [name for name in kept if old[name]["layers"] != new[name]["layers"]]
    rest = [name for name in kept if old[name] != new[name] and name not in layers]
    said = {
        "new": new.keys() - old,
        "gone": old.keys() - new,
        "fuse other layers": layers,
        "other names or kinds": rest,
    }
    for what, names in said.items():
        if names:
            yield f"- {after}, since {before.split()[1]}, {what}: {', '.join(f'`{name}`' for name in sorted(names))}."
