"""``rewrite_manifest.json``: what a conversion changed, for the people and programs that come after it.

The same input and version give the same bytes: no timestamps, no machine names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, Literal

from rewrite.checkpoint.json_edit import dump
from rewrite.ledger.fault import TITLES, Code
from rewrite.version import __version__

MANIFEST_NAME = "rewrite_manifest.json"


@dataclass(frozen=True, slots=True)
class PartitionChange:
    """Rows ``[start, stop)`` of the module now carry ``scale`` each; None: they had scales of their own."""

    name: str
    start: int
    stop: int
    scale: float | None


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """A tensor that changed: a weight scale, or a weight that was dequantized.

    ``old_values`` are the values of the weight scale as stored, ``partitions`` what each row now carries, or was
    multiplied with.
    """

    tensor: str
    shard: str
    old_dtype: str
    old_shape: tuple[int, ...]
    old_values: tuple[float, ...]
    new_dtype: str
    new_shape: tuple[int, ...]
    partitions: tuple[PartitionChange, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "shard": self.shard,
            "before": {"dtype": self.old_dtype, "shape": list(self.old_shape), "scales": list(self.old_values)},
            "after": {
                "dtype": self.new_dtype,
                "shape": list(self.new_shape),
                "partitions": [{"name": p.name, "rows": [p.start, p.stop], "scale": p.scale} for p in self.partitions],
            },
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModuleChange:
        before, after = value["before"], value["after"]
        partitions = (PartitionChange(p["name"], p["rows"][0], p["rows"][1], p["scale"]) for p in after["partitions"])
        return cls(
            value["tensor"],
            value["shard"],
            before["dtype"],
            tuple(before["shape"]),
            tuple(before["scales"]),
            after["dtype"],
            tuple(after["shape"]),
            tuple(partitions),
        )


@dataclass(frozen=True, slots=True)
class GroupChange:
    """A fused group and its modules whose scales became explicit."""

    name: str
    modules: tuple[ModuleChange, ...]


@dataclass(frozen=True)
class ScaleChange:
    """A fused NVFP4 layer, or an expert, whose modules have one global scale now: that of the module ``kept``.

    ``ratios`` are, for each module that had another one, how many times as large that was. Where ``how`` is "folded",
    the module ``into`` took the ratio; where it is "rescaled", the block scales did; "activations": only the scales of
    activations differed.
    """

    name: str
    how: str
    kept: str
    ratios: Mapping[str, float]
    into: str | None


@dataclass(frozen=True)
class ManifestFile:
    """A file of the output. ``rewritten`` is False for one that is a copy of the source's."""

    name: str
    size: int
    rewritten: bool


@dataclass(frozen=True)
class ByteCounts:
    """How the bytes of an output got there."""

    shared: int = 0  # cloned: they lie in blocks of the source and take no space until one side is changed
    copied: int = 0
    written: int = 0  # new: headers, scales, config, index, manifest
    kept: int = 0  # complete since an earlier run that was interrupted
    read: int = 0  # over a network, by this machine; what a store copies by itself is not read
    sent: int | None = 0  # over a network, by this machine; None: nobody has counted it
    unsummed: int = 0  # files that the store has no checksum of: size and ETag are all that was compared at the end

    def __add__(self, other: ByteCounts) -> ByteCounts:
        pairs = zip(astuple(self), astuple(other), strict=True)
        counts: list[Any] = [None if one is None or two is None else one + two for one, two in pairs]
        return ByteCounts(*counts)

    def to_json(self) -> dict[str, int | None]:
        """Without what came over no network."""
        network = ("read", "sent", "unsummed")
        return {key: count for key, count in asdict(self).items() if key not in network or count != 0}


@dataclass(frozen=True)
class Chosen:
    """For whom a profile was chosen that nobody named: engines in ranges of versions, and where they compute."""

    engines: tuple[str, ...]
    platform: str

    def to_json(self) -> dict[str, Any]:
        return {"by": "rewrite", "for": list(self.engines), "platform": self.platform}


@dataclass(frozen=True)
class Manifest:
    """The record of one conversion. ``groups`` is empty where no scale and no weight changed.

    ``counts`` depends on the filesystem: :func:`rewrite.convert` returns it, the published file must not have it.
    """

    profile: str
    selection: str
    source: str
    groups: tuple[GroupChange, ...]
    dropped: tuple[str, ...]  # tensors that the output no longer has
    renamed: Mapping[str, str]  # old name → new name
    notes: tuple[str, ...]  # what the profile changes for those who serve the output
    files: tuple[ManifestFile, ...]
    scales: tuple[ScaleChange, ...] = ()
    costs: Mapping[str, float] = field(default_factory=dict)  # layer.partition → what a weight may be off by, relative
    kv_scales: Literal["kept", "dropped"] = "kept"  # those of the KV cache
    mended: tuple[Code, ...] = ()  # the faults of the config that were mended, by their codes
    tool_version: str = __version__
    created: str | None = None  # ISO 8601, only when asked for
    chosen: Chosen | None = None  # None: whoever converted named the profile
    counts: ByteCounts | None = None

    @property
    def changed(self) -> bool:
        """Whether the output differs from the source."""
        return bool(self.groups or self.dropped or self.renamed or self.scales or self.mended)

    def created_at(self, time: str) -> Manifest:
        return replace(self, created=time)

    def with_counts(self, counts: ByteCounts) -> Manifest:
        return replace(self, counts=counts)

    def to_text(self) -> str:
        return dump(self.to_json())

    def to_json(self) -> dict[str, Any]:
        created = {} if self.created is None else {"created": self.created}
        return {
            "tool": {"name": "rewrite", "version": self.tool_version},
            "profile": self.profile,
            **({} if self.chosen is None else {"chosen": self.chosen.to_json()}),
            "selection": self.selection,
            "source": self.source,
            **created,
            **({"costs": dict(self.costs)} if self.costs else {}),
            "groups": [{"name": g.name, "modules": [m.to_json() for m in g.modules]} for g in self.groups],
            **({"global_scales": [asdict(each) for each in self.scales]} if self.scales else {}),
            "dropped": list(self.dropped),
            **({} if self.kv_scales == "kept" else {"kv_scales": self.kv_scales}),
            **({"mended": {code: TITLES[code] for code in self.mended}} if self.mended else {}),
            "renamed": dict(self.renamed),
            "notes": list(self.notes),
            "files": [{"name": f.name, "size": f.size, "rewritten": f.rewritten} for f in self.files],
            **({} if self.counts is None else {"bytes": self.counts.to_json()}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_json`."""
        return cls(
            profile=value["profile"],
            selection=value["selection"],
            dropped=tuple(value["dropped"]),
            kv_scales=value.get("kv_scales", "kept"),
            mended=tuple(value.get("mended", ())),
            renamed=value["renamed"],
            notes=tuple(value["notes"]),
            source=value["source"],
            groups=tuple(
                GroupChange(g["name"], tuple(ModuleChange.from_json(m) for m in g["modules"])) for g in value["groups"]
            ),
            files=tuple(ManifestFile(**f) for f in value["files"]),
            scales=tuple(ScaleChange(**each) for each in value.get("global_scales", ())),
            costs=value.get("costs", {}),
            tool_version=value["tool"]["version"],
            created=value.get("created"),
            chosen=Chosen(tuple(value["chosen"]["for"]), value["chosen"]["platform"]) if "chosen" in value else None,
            counts=ByteCounts(**value["bytes"]) if "bytes" in value else None,
        )
