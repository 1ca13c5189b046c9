"""One global scale for fused NVFP4 layers, at the shapes of Qwen3.5-35B-A3B: every expert, every Gated DeltaNet.

`python -m benchmark.rescaling DIR LAYERS` writes the checkpoint: random codes, block scales and global scales, so that
all that engines fuse has different ones.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmark.measure import Run, python, read_through, run, start_even
from benchmark.qwen import Tensor, moe, tensors
from benchmark.shards import name_shards, split, write_side_files
from benchmark.table import Bound, judge, spread, table

LAYERS = 8  # of 40
_MAX_SHARD_BYTES = 1_000_000_000
COPY, FOLDED, RESCALED = "cp -r", "rewrite convert", "rewrite convert --profile rescaled"
_COMMANDS = {
    COPY: ("cp", "-r"),
    FOLDED: python("rewrite", "convert", "--json"),
    RESCALED: python("rewrite", "convert", "--json", "--profile", "rescaled"),
}


@dataclass(frozen=True)
class Measured:
    """The runs of each program, and the bytes that it made anew in OUT (0 for cp)."""

    runs: Mapping[str, Sequence[Run]]
    written: Mapping[str, int]
    size: int

    def ratios(self, name: str) -> list[float]:
        """Time over that of the copy, by round."""
        pairs = zip(self.runs[name], self.runs[COPY], strict=True)
        return [own.seconds / copy.seconds for own, copy in pairs]


_BOUNDS = (
    Bound("time of rescaling / cp -r", 1.5, lambda m: median(m.ratios(RESCALED))),
    Bound("time of folding / cp -r", 1.5, lambda m: median(m.ratios(FOLDED))),
    Bound("peak memory, MB", 80, lambda m: max(r.peak_bytes for n in (FOLDED, RESCALED) for r in m.runs[n]) / 1e6),
)


def measure(work: Path, rounds: int, *, cold: bool, say: Callable[[str], None]) -> Measured:
    """``rounds`` times every program, in an order that rotates."""
    source = work / "nvfp4"
    source.mkdir()
    run(python("benchmark.rescaling", source, str(LAYERS)))
    runs: dict[str, list[Run]] = {name: [] for name in _COMMANDS}
    written = dict.fromkeys(_COMMANDS, 0)
    for number in range(rounds):
        names = list(_COMMANDS)
        for name in names[number % 3 :] + names[: number % 3]:
            start_even(cold=cold)
            if not cold:
                read_through(source)
            result = run([*_COMMANDS[name], source, work / "out"], synced=work)
            runs[name].append(result)
            written[name] = _written(name, result)
            say(f"round {number + 1}: {name}: {result.seconds:.2f} s")
            shutil.rmtree(work / "out")
    size = sum(path.stat().st_size for path in source.iterdir())
    shutil.rmtree(source)
    return Measured(runs, written, size)


def _written(name: str, result: Run) -> int:
    if name == COPY:
        return 0
    answer: dict[str, Any] = json.loads(result.output)
    return int(answer["bytes"]["written"])


def report(measured: Measured) -> Iterator[str]:
    """A table, and whether the bounds are reached."""
    yield f"NVFP4 checkpoint: Qwen3.5-35B-A3B shapes, {LAYERS} of 40 layers, {measured.size / 1e9:.2f} GB."
    rows: list[Sequence[str]] = [("", "seconds", "/ cp -r", "CPU s", "peak MB", "written MB")]
    for name, results in measured.runs.items():
        peak = f"{max(r.peak_bytes for r in results) / 1e6:.0f}"
        written = f"{measured.written[name] / 1e6:.1f}"
        seconds, cpu = (f"{median(each):.2f}" for each in ([r.seconds for r in results], [r.cpu for r in results]))
        rows.append((name, seconds, spread(measured.ratios(name)), cpu, peak, written))
    yield from table(rows, right={1, 2, 3, 4, 5})
    yield ""
    yield from judge(_BOUNDS, measured)


def make(directory: Path, layers: int) -> None:
    """The checkpoint, with the stock ``save_file``."""
    import torch
    from safetensors.torch import save_file

    model = replace(moe(layers), nvfp4=True)
    shards = split(tensors(model), _MAX_SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, shard in name_shards(shards):
        save_file({t.name: _random(t, generator) for t in shard}, directory / name, metadata={"format": "pt"})
    write_side_files(directory, model, shards)


def _random(tensor: Tensor, generator: Any) -> Any:
    import torch

    if tensor.dtype == "F32":  # divisors, as llm-compressor's: up to six times apart
        return torch.rand(tensor.shape, generator=generator) * 25_000 + 5_000
    if tensor.dtype == "BF16":
        return torch.randn(tensor.shape, generator=generator).bfloat16()
    high = 256 if tensor.dtype == "U8" else 127  # E4M3 from 0 to 448
    found = torch.randint(0, high, tensor.shape, generator=generator, dtype=torch.uint8)
    return found if tensor.dtype == "U8" else found.view(torch.float8_e4m3fn)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
