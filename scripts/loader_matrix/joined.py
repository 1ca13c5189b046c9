"""INT4 and MXFP4: whether vLLM's fused layers hold the stored tensors of a checkpoint, joined.

    PYTHONPATH=scripts:. python -m loader_matrix.joined [CHECKPOINT ...]

Prints a count by layer and parameter. By default two exports of the zoo.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from loader_matrix.driver import Batch, Task
from loader_matrix.engines import find_engine
from loader_matrix.envs import environment

ENGINE = find_engine("vllm==0.32.0")
ENTRIES = ("llmc-w4a16-qwen3_5-text", "llmc-mxfp4-qwen3_5-text")


def run(checkpoint: Path, folder: Path) -> dict[str, object]:
    """What the driver says of one checkpoint."""
    task = Task(checkpoint.name, str(checkpoint), str(checkpoint), str(folder), str(folder / "log"), 1)
    batch = folder / "batch.json"
    Batch(ENGINE.version, str(folder / "log"), (task,)).write(batch)
    where = environment(ENGINE)
    subprocess.run([str(where.python), "-m", "loader_matrix.joined_vllm", str(batch)], env=where.variables, check=True)
    return dict(json.loads(task.out(0).read_text()))


def main(words: list[str]) -> None:
    """Counts, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [Path(word) for word in words] or _zoo(Path(folder))
        for checkpoint in checkpoints:
            place = Path(tempfile.mkdtemp(dir=folder))
            result = run(checkpoint, place)
            joined = result.get("joined")
            if not isinstance(joined, dict):
                raise SystemExit(f"{checkpoint.name}: {result}")
            kinds = Counter((*name.rsplit(".", 2)[1:], said) for name, said in joined.items())
            for (layer, kind, said), count in sorted(kinds.items()):
                print(f"{checkpoint.name}  {layer}.{kind}  {said}  {count}")


def _zoo(folder: Path) -> list[Path]:
    from tests.zoo.rebuild import rebuild

    return [rebuild(name, folder / name) for name in ENTRIES]


if __name__ == "__main__":
    main(sys.argv[1:])
