"""Convert and verify every fixture and two real shapes on one device; print errors and times. See gpu_check.sh."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import rewrite
from rewrite.cli.terminal import table_lines, width
from rewrite.report.page import Table
from rewrite.verification.result import worst

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
#: hidden size, key heads, value heads; heads of 128 (config.json of the published models).
REAL_SHAPES = {"Qwen3.5-9B": (4096, 16, 32), "Qwen3.5-27B": (5120, 16, 48)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rows", type=int, help="of each partition; without it, all of them")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name(arguments.device) if arguments.device != "cpu" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.tokens} tokens, {arguments.rows or 'all'} rows\n")
    rows = [
        ["checkpoint", "layer", "partition", "weights before fix", "fixed", "OUT", "outputs before fix", "fixed", "OUT"]
    ]
    rows[0] += ["bound used", "verdict", "seconds"]
    with tempfile.TemporaryDirectory() as folder:
        for source in checkpoints(Path(folder)):
            rows += check(source, Path(folder) / f"{source.name}-converted", arguments)
    table = Table("", tuple(rows[0]), tuple(map(tuple, rows[1:])), numbers=3, labels=3)
    print("\n".join(line.plain for line in table_lines(table, width(sys.stdout))))
    sys.exit(0 if all(row[-2] == "ok" for row in rows[1:]) else 1)


def checkpoints(folder: Path) -> Iterator[Path]:
    """Every fixture, then the real shapes."""
    yield from sorted(path.parent for path in FIXTURES.glob("*/config.json"))
    for name, shape in REAL_SHAPES.items():
        yield make_group(folder / name, *shape)


def make_group(directory: Path, hidden: int, key_heads: int, value_heads: int) -> Path:
    """A checkpoint of one projection group of normal weights, FP8 per tensor as llm-compressor writes it."""
    generator = torch.Generator().manual_seed(0)
    rows = {"in_proj_qkv": 128 * (2 * key_heads + value_heads), "in_proj_z": 128 * value_heads}
    tensors = {}
    for module, size in rows.items():
        weight = torch.randn(size, hidden, generator=generator) * (0.02 if module == "in_proj_qkv" else 0.007)
        scale = (weight.abs().max() / 448).to(torch.bfloat16)
        prefix = f"model.layers.0.linear_attn.{module}"
        tensors[f"{prefix}.weight"] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{prefix}.weight_scale"] = scale.reshape(1)
        tensors[f"{prefix}.input_scale"] = torch.tensor([0.01], dtype=torch.bfloat16)
    config = json.loads((FIXTURES / "llmcompressor-qwen3_5-text" / "config.json").read_text())
    config |= {"hidden_size": hidden, "linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads}
    config |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def check(source: Path, out: Path, arguments: argparse.Namespace) -> list[list[str]]:
    """A row for each partition of every fused layer: the group that is furthest off."""
    try:
        rewrite.convert(source, out, selection="all")
    except rewrite.Unsupported:  # mixed precision: no channel scales there
        rewrite.convert(source, out, profile="bf16", selection="all")
    started = time.monotonic()
    found = rewrite.verify(source, out, device=arguments.device, tokens=arguments.tokens, rows=arguments.rows)
    seconds = time.monotonic() - started
    rows = []
    for row in worst(found.numbers):
        errors = [row.weights_before, row.weights_fixed, row.weights_out]
        errors += [row.outputs_before, row.outputs_fixed, row.outputs_out]
        used = "-" if row.bound_used is None else f"{row.bound_used:.2f}"
        cells = [f"{error:.2e}" if error > 1e-12 else "0" for error in errors]
        rows.append([source.name, row.layer, row.partition, *cells, used, row.verdict, f"{seconds:.1f}"])
    for problem in (p for c in found.checks if c.verdict == "FAILED" for p in c.problems):
        print(problem)
    if not found.ok:
        rows[-1][-2] = "FAILED"
    return rows


if __name__ == "__main__":
    main()
