"""Inspections and verifications that no file stands behind: large ones, and ones with names from hostile strangers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from rewrite.inspection.advice import advise, repair_command
from rewrite.inspection.inspection import Inspection
from rewrite.ledger.fault import Fault
from rewrite.loaders.layer import Layer, Part
from rewrite.loaders.outcome import AS_IT_IS, Outcome, Row
from rewrite.loaders.versions import LOADERS
from rewrite.loaders.views import CheckpointView
from rewrite.report import inspected, verified
from rewrite.report.checkpoints import Place, Side
from rewrite.report.page import Page, Run
from rewrite.verification.result import Check, EngineChange, PartitionNumbers, Settings, Verification

HOSTILE = (
    "<script>alert(1)</script>",
    '"]]><img src=x onerror=alert(2)>',
    "](javascript:alert(3)) [x](javascript:alert(4))",
    "![x](https://evil.example/x.png) <https://evil.example> https://evil.example",
    "\u202egnp.exe \u05d0\u05d1",
    "a\nb\r\n# heading\n```",
    "$x^2$ $\\bad{$ y_",
    "_hidden_ 100% *bold* `code` | cell | ~~x~~ @user #1",
    "\x1b[31mred\x00",
    "</title></style></svg><script>alert(5)</script>&lt;script&gt;",
    "{{ 7 * 7 }}{% raw %}",
    "long" * 400,
)
RUN = Run("rewrite verify IN OUT --report report.html", (("rewrite", "0"), ("python", "3")), ("a remark",))


def group(name: str, scales: Mapping[str, float | None], layout: str = "tensor") -> Layer:
    partitions = tuple(
        Part(part, f"{name}.{part}", 64, layout, scale)  # type: ignore[arg-type]
        for part, scale in scales.items()
    )
    return Layer(name, name.rpartition(".")[2] or name, partitions, 64, static_activations=True)


def inspection(groups: tuple[Layer, ...], **changes: object) -> Inspection:
    """With what the loader model says of these groups; nothing is converted."""
    some = groups[:200]  # of thousands the first: what loaders make of them takes minutes
    view = CheckpointView("qwen3_5", "compressed-tensors", True, "bfloat16", False, bool(groups), True, some)
    rows = tuple(Row(loader, {AS_IT_IS: loader.serves(view, None)}) for loader in LOADERS)
    values: dict[str, object] = {
        **{"path": "/somewhere/in", "selection": "qkvz", "model_type": "qwen3_5", "dialect": "compressed-tensors"},
        **{"shards": 1, "tensors": 1, "nbytes": 1, "schemes": {"float8": 1}, "groups": groups, "findings": ()},
        **{"rows": rows, "refusals": {}, **changes},
    }
    return Inspection(**values)  # type: ignore[arg-type]


def numbers(group: str, partition: str, before: float, fixed: float = 0.01, out: float = 0.0) -> PartitionNumbers:
    return PartitionNumbers(group, partition, before, fixed, out, before, fixed, out, None, "ok", "agrees")


def verification(rows: tuple[PartitionNumbers, ...], **changes: object) -> Verification:
    outcomes = {"IN": Outcome("garbled"), "OUT": Outcome("exact")}
    loaders = tuple(EngineChange(loader, outcomes, change=-1) for loader in LOADERS)
    values: dict[str, object] = {
        **{"source": "/somewhere/in", "out": "/somewhere/out", "settings": Settings("cpu", 32, 0, "fixed")},
        "checks": tuple(Check(name, "ok", "all of it") for name in ("structure", "untouched", "weights", "outputs")),
        **{"numbers": rows, "loaders": loaders, "digests": {"config.json": "0" * 64}, **changes},
    }
    return Verification(**values)  # type: ignore[arg-type]


def of_verification(found: Verification, source: Inspection | None, out: Inspection | None = None) -> Page:
    sides = [
        Side(Place(name, "a directory"), each, "" if each else "it cannot be opened")
        for name, each in (("in", source), ("out", out))
    ]
    return verified.report(found, sides[0], sides[1], "profile exact, groups qkvz", RUN)


def of_inspection(found: Inspection) -> Page:
    advice = advise(found, LOADERS)
    return inspected.page(found, LOADERS, advice, repair_command(found, advice), Place("model", "a directory"), RUN)


def many(layers: int, experts: int) -> Iterator[tuple[Layer, tuple[PartitionNumbers, ...]]]:
    """Fused layers and experts of a large model, each expert a group of its own, all of them different."""
    for layer in range(layers):
        at = f"model.language_model.layers.{layer}"
        low, high = 1e-4 * (1 + layer % 7 / 5), 7e-4 * (1 + layer % 5 / 4)
        if layer % 4 < 3:
            name = f"{at}.linear_attn.in_proj_qkvz"
            yield (
                group(name, {"q": high, "k": high, "v": high, "z": low}),
                tuple(numbers(name, part, 4.0 + layer % 9 if part in "kv" else 0.0, 0.02) for part in "qkvz"),
            )
        for expert in range(experts):
            name = f"{at}.mlp.experts.{expert}.gate_up_proj"
            pair = _gate_and_up((expert * 37 + layer) % 101, expert % 13)
            yield (
                Layer(name, "gate_up_proj", pair, 64, static_activations=True),
                tuple(numbers(name, part, 0.0, 0.001 * (1 + (expert * 7) % 31)) for part in ("gate", "up")),
            )


@cache
def _gate_and_up(size: int, apart: int) -> tuple[Part, ...]:
    scale = 2e-4 * (1 + size / 40)
    scales = {"gate": scale, "up": scale * (1 + apart / 10)}
    return tuple(Part(name, f"an expert's {name}", 64, "tensor", each) for name, each in scales.items())


def large(layers: int = 60, experts: int = 2_000) -> tuple[Verification, Inspection]:
    pairs = list(many(layers, experts))
    groups = tuple(each for each, _ in pairs)
    rows = tuple(row for _, found in pairs for row in found)
    digests = {f"model-{i:05}-of-01000.safetensors": f"{i:064x}" for i in range(1000)}
    return verification(rows, digests=digests), inspection(groups, selection="all")


def hostile() -> tuple[Verification, Inspection]:
    """Every name of :data:`HOSTILE` in every place where a stranger's name can stand."""
    found = [
        group(f"model.layers.{i}.{name.replace('.', '')}", {name: 1e-3 * (i + 1), f"{name}z": 1e-4})
        for i, name in enumerate(HOSTILE)
    ]
    rows = tuple(numbers(g.name, p.name, 1.0 + i) for i, g in enumerate(found) for p in g.parts)
    problems = tuple(f"{name}: broken" for name in HOSTILE)
    checks = tuple(Check(name, "FAILED", name, problems, name) for name in ("structure", *HOSTILE))
    source = inspection(
        tuple(found), model_type=HOSTILE[0], dialect=HOSTILE[1], schemes=dict.fromkeys(HOSTILE, 2),
        findings=tuple(Fault("weights", name, name) for name in HOSTILE), refusals=dict.fromkeys(HOSTILE, HOSTILE[0]),
    )  # fmt: skip
    return verification(rows, checks=checks, digests=dict.fromkeys(HOSTILE, "0" * 64)), source
