"""The first inputs of the fuzzer, ``-m fuzz.seeds DIRECTORY``: small sound files, and the tensors of every fixture."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.crafted_cases import CONFIG, INDEX, SHARDS, file_of, sound

SEPARATOR = b"\n=8<=\n"
FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"


def main(directory: Path) -> None:
    files = sound()
    headers = [files[shard] for shard in SHARDS]
    headers += [file_of(header) for header in (b"{}", b'{"__metadata__":{"format":"pt"}}', b"{} \n\t\r", b"{nope")]
    headers += [_small(path.read_bytes()) for path in sorted(FIXTURES.glob("*/*.safetensors"))]
    checkpoints = [SEPARATOR.join(files[name] for name in (CONFIG, INDEX, *SHARDS))]
    checkpoints += [
        SEPARATOR.join([path.read_bytes(), *(files[name] for name in (INDEX, *SHARDS))])
        for path in sorted(FIXTURES.glob("*/config.json"))
    ]
    for target, inputs in (("header", headers), ("checkpoint", checkpoints)):
        folder = directory / target
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(content)


def _small(raw: bytes) -> bytes:
    """A file with the same metadata and the first tensors, without elements: names, dtypes and ranks are real."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = {"__metadata__": header.pop("__metadata__", {"format": "pt"})}
    first = {
        name: {**entry, "shape": [0, *entry["shape"][1:]], "data_offsets": [0, 0]}
        for name, entry in list(header.items())[:4]
    }
    return file_of(json.dumps({**metadata, **first}).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
