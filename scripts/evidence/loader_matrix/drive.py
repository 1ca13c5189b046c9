"""Inside an engine: the driver of `rewrite try` loads each checkpoint. Its result becomes a cell's (`results.py`).

The same for all engines. What is known of families here only names the partitions, as the predictions do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engines import driver, trying

from loader_matrix.results import worst_kv

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engines.driver import Job, Result

    from loader_matrix.truth import Truth

_PACKAGES = ("vllm", "sglang", "transformers", "compressed_tensors")
#: By a stored linear's last name: the layer that engines fuse it into, and its partitions there (those that
#: rewrite/quantization has). An engine that serves the parts as modules of their own has the partitions all the same.
FUSED = {
    "in_proj_qkv": ("in_proj_qkvz", ("q", "k", "v")),
    "in_proj_z": ("in_proj_qkvz", ("z",)),
    "in_proj_qkvz": ("in_proj_qkvz", ("qkvz",)),
    "qkv_proj": ("qkv_proj", ("q", "k", "v")),
    "gate_up_proj": ("gate_up_proj", ("gate", "up")),
    "q_a_proj": ("fused_qkv_a_proj", ("q_a",)),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", ("kv_a",)),
    **{f"{part}_proj": ("qkv_proj", (part,)) for part in ("q", "k", "v")},
    **{f"{part}_proj": ("gate_up_proj", (part,)) for part in ("gate", "up")},
}


def measure(job: Job) -> Result:
    """What became of one checkpoint, on one rank."""
    from loader_matrix.truth import Truth

    truth = Truth(job.truth)
    return told(trying.measure(job, cuts=truth.shares()), truth, job.rank)


def told(result: Result, truth: Truth, rank: int) -> Result:
    """What `try` measured, as the record has it: of the language model's linear layers only."""
    if result["failure"]:
        return _failure(**result["failure"])
    rows = list(_layers(result["layers"], rank))
    seen = {source for layer in rows for source in layer["sources"]}
    missing = {name for name in truth.quantized() if _any_expert(name) not in seen}
    unread = missing & truth.nvfp4()  # engines may shuffle NVFP4 weights for their kernels: that is not read
    if missing - unread:  # nothing that was not compared may pass
        names = sorted(missing - unread)
        raise ValueError(f"{len(names)} quantized modules were not compared: {', '.join(names[:3])}")
    return {
        "layers": rows,
        "strays": [row["module"] for row in result["layers"] if row["cast"] and _canonical(row) is None],
        "not_compared": sorted({name.rpartition(".")[2] for name in unread | truth.packed()}),
        "kv_cache": _kv_cache(result["cache"], truth),
    }


def _failure(loading: Result | None, reference: Result | None) -> Result:
    """A checkpoint that is loaded, but not without quantization: nothing was learnt."""
    error = loading or reference or {}
    said = {"message": driver.first_line(error["message"]), "where": _where(error["where"])}
    return {"error" if loading else "fault": {"type": error["type"], **said}}


def _where(frames: list[str]) -> str:
    """`file:function` of the innermost frame of the engine, else of what it loads with."""
    for package in _PACKAGES:
        if inside := [frame for frame in frames if frame.startswith(f"{package}/")]:
            return re.sub(r":\d+ ", ":", inside[-1])
    return "unknown"


def _canonical(row: Result) -> str | None:
    from loader_matrix.truth import canonical

    name: str | None = canonical(row["module"])
    return name and name.removesuffix(".routed_experts")  # vLLM's name for the module inside `experts`


def _any_expert(name: str) -> str:
    """Experts one by one, and gate and up, are one matrix in some engines."""
    name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    return re.sub(r"\.experts\.(gate|up)_proj$", ".experts.gate_up_proj", name)


def _layers(rows: list[Result], rank: int) -> Iterator[Result]:
    from loader_matrix.truth import canonical

    for row in rows:
        name, parts = _canonical(row), row["parts"]
        is_experts = len(row["shape"]) == 3 and (name or "").endswith(".experts")
        sources = [_any_expert(canonical(_module(part["tensor"])) or "") for part in parts]
        is_linear = bool(parts) and all(sources) and (is_experts or len(row["shape"]) == 2)
        if name is None or not is_linear:
            continue
        layer = None if is_experts else FUSED.get(sources[0].rpartition(".")[2], (None,))[0]
        yield {
            "module": f"{name}.{row['parameter'].removesuffix('_weight')}" if is_experts else name,
            "layer": layer,
            "sources": sources,
            "errors": dict(zip(_partitions(sources), (float(part["error"]) for part in parts), strict=True)),
            "input_scale": _input_scale(row),
            "cast": row["cast"],
            "rank": rank,
        }


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").removesuffix(".weight_packed")


def _partitions(sources: list[str]) -> list[str]:
    """The name of each part of a layer. Parts of one stored linear follow each other."""
    names = []
    for at, source in enumerate(sources):
        own = FUSED.get(source.rpartition(".")[2], (None, ()))[1]
        nth = sources[:at].count(source)
        names.append(own[nth] if nth < len(own) and sources.count(source) == len(own) else f"{source}.{nth}")
    return names


def _input_scale(row: Result) -> str:
    """`equal`, `differs`, or `absent` (the engine quantizes activations dynamically, or not at all)."""
    scale = row["input_scale"]
    if scale is None or scale["served"] is None or (row["held"] == "nvfp4" and len(row["shape"]) == 3):
        return "absent"  # of experts in NVFP4 engines keep what their kernels want
    return "equal" if scale["served"] == [scale["stated"]] * 2 else "differs"


def _kv_cache(held: Result, truth: Truth) -> str:
    """The scales of the KV cache: `none` on disk, `equal`, `rounded` to BF16, `differs`, or `absent` (no attention
    layer holds one, or it holds 1, what engines set where nothing was loaded). The worst of all layers."""
    from loader_matrix.truth import canonical

    found = set()
    for (layer, which), true in truth.kv_scales().items():
        own = [scales for name, scales in held.items() if f"{canonical(name)}.".startswith(layer)]
        found.add(_kv_word({float(scales[which]) for scales in own if which in scales}, true))
    return worst_kv(found or {"none"})


def _kv_word(served: set[float], true: float) -> str:
    import torch

    if not served or (served == {1.0} and true != 1.0):
        return "absent"
    if served == {true}:
        return "equal"
    return "rounded" if served == {torch.tensor(true).bfloat16().item()} else "differs"


if __name__ == "__main__":
    trying.run(measure)
