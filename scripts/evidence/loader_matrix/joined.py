"""INT4 and MXFP4: whether vLLM's fused layers hold the stored tensors of a checkpoint, joined.

    scripts/evidence.sh joined [CHECKPOINT ...]

Prints a count by layer and parameter. By default two exports of the zoo.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from contextlib import closing
from pathlib import Path

from engines.driver import Unavailable
from engines.envs import environment
from engines.known import find_engine
from engines.process import Checkpoint, Process

ENGINE = find_engine("vllm==0.32.0")
ENTRIES = ("llmc-w4a16-qwen3_5-text", "llmc-mxfp4-qwen3_5-text")


def main(words: list[str]) -> None:
    """Counts, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [Path(word) for word in words] or _zoo(Path(folder))
        process = Process(ENGINE, environment(ENGINE), "loader_matrix.joined_vllm")
        with closing(process):
            results = process.load([Checkpoint(each.name, each, each) for each in checkpoints], Path(folder))
        for checkpoint, result in zip(checkpoints, results, strict=True):
            if isinstance(result, Unavailable) or "joined" not in result[0]:
                raise SystemExit(f"{checkpoint.name}: {result}")
            kinds = Counter((*name.rsplit(".", 2)[1:], said) for name, said in result[0]["joined"].items())
            for (layer, kind, said), count in sorted(kinds.items()):
                print(f"{checkpoint.name}  {layer}.{kind}  {said}  {count}")


def _zoo(folder: Path) -> list[Path]:
    from tests.zoo.rebuild import rebuild

    return [rebuild(name, folder / name) for name in ENTRIES]


if __name__ == "__main__":
    main(sys.argv[1:])
