"""One thing that is wrong, and the words for each kind of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Code = Literal[
    "label",
    "plain-layer",
    "fused-name",
    "ignore-pattern",
    "no-scale",
    "scale-shape",
    "no-input-scale",
    "orphan-scale",
    "scale-value",
    "scale-size",
    "scale-inverse",
    "no-role",
    "scale-name",
    "missing",
    "uncounted",
    "wrapped-name",
    "no-config",
    "no-activations",
    "arguments",
    "status",
    "router",
    "no-matrix",
    "kv-scale-alone",
    "kv-scale-shape",
    "kv-no-scale",
    "mtp-format",
    "mtp-label",
    "mtp-missing",
    "group-in-part",
    "architecture",
    "block-sample",
    "weights",
]

#: What each code means, in a few words that go before what was found.
TITLES: Mapping[Code, str] = {
    "label": "config and tensors disagree",
    "plain-layer": "the config says quantized, and the weights are plain",
    "fused-name": "ignore has the name of the fused layer only, and its parts are stored",
    "ignore-pattern": "a pattern of ignore matches the parts of a fused layer, and not the layer",
    "no-scale": "a quantized weight without its scale",
    "scale-shape": "a scale does not fit its weight",
    "no-input-scale": "static activations without an input_scale",
    "orphan-scale": "a scale without its weight",
    "no-role": "a scale that its layer has no place for",
    "scale-value": "a scale of",
    "scale-size": "a scale that is probably wrong",
    "scale-inverse": "a scale that is probably the reciprocal of what is meant",
    "scale-name": "a scale whose name engines do not look for",
    "missing": "a part of the model is not stored",
    "uncounted": "other numbers of layers, experts or words than the config says",
    "wrapped-name": "names that begin with those of a training wrapper",
    "no-activations": "the config does not say how activations are quantized",
    "arguments": "the config contradicts itself, and compressed-tensors does not read it",
    "no-config": "FP8 weights, and no config says how they are quantized",
    "status": "quantization_status is not compressed",
    "router": "a quantized router: engines build it as a plain layer",
    "no-matrix": "a quantized weight that is no matrix",
    "kv-scale-alone": "a scale of the KV cache without its partner",
    "kv-scale-shape": "a scale of the KV cache that is not one number",
    "kv-no-scale": "an FP8 KV cache is stated, and no scale of it is stored: engines take 1.0",
    "mtp-format": "the MTP layers are stored in another way than the config says",
    "mtp-label": "the MTP layers are stored in another format than the config says",
    "mtp-missing": "the config promises MTP layers, and none are stored",
    "group-in-part": "quantized in part",
    "architecture": "unknown architecture",
    "block-sample": "block scales were looked at in part",
    "weights": "",
}

#: What a reader may want to know, and what is no fault.
NOTES: frozenset[Code] = frozenset({"mtp-missing", "block-sample"})

#: What engines end with, or read as other numbers, and what no edit of a config mends: ``convert`` refuses it.
REFUSED: frozenset[Code] = frozenset(
    (
        *("label", "no-scale", "scale-shape", "no-input-scale", "no-role", "router", "no-matrix"),
        *("plain-layer", "fused-name", "mtp-format", "mtp-label", "kv-scale-alone", "kv-scale-shape", "missing"),
        *("arguments", "ignore-pattern"),
    )
)

#: What a gate can be set to, each with all before it: silent garbage; what does not load or run; a loss of precision;
#: what is not known.
Severity = Literal["garbled", "fails", "precision", "unknown"]
SEVERITIES: tuple[Severity, ...] = ("garbled", "fails", "precision", "unknown")

#: The worst that comes of a fault; of the others, that engines fail.
_SEVERITY: Mapping[Code, Severity] = {
    "plain-layer": "garbled",
    "fused-name": "garbled",
    "ignore-pattern": "garbled",
    "no-scale": "garbled",
    "no-input-scale": "garbled",
    "status": "garbled",
    "scale-value": "garbled",
    "scale-size": "garbled",
    "scale-inverse": "garbled",
    "missing": "garbled",
    "weights": "garbled",
    "architecture": "garbled",
    "no-config": "garbled",
    "kv-no-scale": "precision",
}

#: What only the values of scales show.
VALUES: frozenset[Code] = frozenset({"scale-value", "scale-size", "scale-inverse", "block-sample"})

AGAIN = "export the model again"
CALIBRATE = "calibration failed for this layer: quantize the model again"


@dataclass(frozen=True)
class Fault:
    """``where`` names the first tensor or module of those that have it, ``count`` how many do; ``next`` is what to
    do."""

    code: Code
    where: str
    found: str = ""
    expected: str = ""
    next: str = ""
    count: int = 1

    @property
    def tensor(self) -> str:
        """The tensor, or the module, without its shard."""
        return self.where.rpartition(": ")[2]

    @property
    def severity(self) -> Severity:
        return _SEVERITY.get(self.code, "fails")

    @property
    def what(self) -> str:
        """In one sentence."""
        title, number = TITLES[self.code], f" ({self.count:,} layers)" if self.count > 1 else ""
        if not title:
            return self.found
        return (
            f"{title} {self.found}"
            if self.code in ("scale-value", "architecture")
            else f"{title}{self._details}{number}"
        )

    @property
    def _details(self) -> str:
        return f": {self.found}" if self.found else ""

    def to_json(self) -> dict[str, object]:
        """For programs: ``what`` is for people and may change."""
        return {
            "code": self.code,
            "severity": self.severity,
            "what": self.what,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "next": self.next,
            "count": self.count,
        }


def is_finite(fault: Fault) -> bool:
    """False: of a scale that is NaN or infinite."""
    return fault.code != "scale-value" or not fault.found.lower().startswith(("nan", "inf", "-inf"))


def merged(faults: Iterable[Fault]) -> Iterator[Fault]:
    """Those that differ in the place only as one, with the first place."""
    found: dict[Fault, Fault] = {}
    for fault in faults:
        kind = replace(fault, where="", count=1)
        first = found.get(kind)
        found[kind] = fault if first is None else replace(first, count=first.count + fault.count)
    yield from found.values()
