"""`python -m benchmark.headers IN`: all names, dtypes and shapes, read with the stock reader."""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors import safe_open


def main(directory: Path) -> int:
    """The number of tensors."""
    count = 0
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_slice(name)
                tensor.get_dtype(), tensor.get_shape()
                count += 1
    return count


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
