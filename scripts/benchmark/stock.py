"""`python -m benchmark.stock IN OUT`: the change with safetensors and torch, as anyone would write it."""

from __future__ import annotations

import json
import shutil
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from benchmark.expansion import TARGET, expand_scales, read_rows
from benchmark.shards import INDEX_NAME


def main(source: Path, out: Path) -> None:
    out.mkdir()
    rows = read_rows(source)
    total = 0
    for path in sorted(source.iterdir()):
        if path.suffix != ".safetensors":
            shutil.copy2(path, out / path.name)
            continue
        tensors = expand_scales(load_file(path), rows)
        save_file(tensors, out / path.name, metadata={"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = _read(out / INDEX_NAME)
    index["metadata"]["total_size"] = total
    _write(out / INDEX_NAME, index)
    config = _read(out / "config.json")
    _add_channel_group(config["quantization_config"]["config_groups"])
    _write(out / "config.json", config)


def _add_channel_group(groups: dict[str, Any]) -> None:
    group = deepcopy(groups["group_0"])
    group["targets"] = [TARGET]
    group["weights"]["strategy"] = "channel"
    groups["group_1"] = group


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


if __name__ == "__main__":
    print(time.monotonic(), flush=True)  # the parent takes what came before, interpreter and imports, off the time
    main(Path(sys.argv[1]), Path(sys.argv[2]))
