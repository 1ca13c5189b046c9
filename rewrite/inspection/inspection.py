"""Model → :class:`Inspection`. Reads headers, config and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rewrite.errors import Refused
from rewrite.inspection.findings import Finding, find_faults
from rewrite.loaders.kernels import DEFAULT_PLATFORM, Used
from rewrite.loaders.outcome import Outcome
from rewrite.loaders.versions import LOADERS, Loader
from rewrite.loaders.views import CheckpointView, GroupView, spread, view_model
from rewrite.planning.planner import plan_changes
from rewrite.planning.profiles import PROFILES
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model


@dataclass(frozen=True)
class LoaderRow:
    """What one loader version range makes of the checkpoint as it is and after ``convert`` with each profile."""

    loader: Loader
    as_is: Outcome
    converted: dict[str, Outcome | None]  # None: convert refuses this checkpoint with that profile
    kernels: tuple[Used, ...] = ()  # of the fused groups as they are, for each card of the platform
    kernels_converted: dict[str, tuple[Used, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """Everything that ``rewrite inspect`` says. ``refusals`` has the reason for each profile that cannot convert it."""

    path: str
    selection: Selection
    model_type: str
    dialect: str
    shards: int
    tensors: int
    nbytes: int
    schemes: dict[str, int]  # wording of a scheme → number of linear layers
    groups: tuple[GroupView, ...]
    findings: tuple[Finding, ...]
    rows: tuple[LoaderRow, ...]
    refusals: dict[str, str]
    idle: tuple[str, ...] = ()  # profiles that would change nothing
    platform: str | None = None  # what outcomes are about; None: loading only

    def affected(self, loaders: Iterable[Loader] = LOADERS) -> tuple[LoaderRow, ...]:
        """The rows of ``loaders`` that do not serve the checkpoint exactly as it is."""
        chosen = set(loaders)
        return tuple(row for row in self.rows if row.loader in chosen and row.as_is.kind != "exact")

    @property
    def shown_profiles(self) -> list[str]:
        """Those worth a column: not refused, and, where they keep the scales, not idle."""
        left_out = {*self.refusals, *(name for name in self.idle if PROFILES[name].promise.scale == "kept")}
        return [name for name in self.rows[0].converted if name not in left_out]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "platform": self.platform,
            "selection": self.selection,
            "model_type": self.model_type,
            "dialect": self.dialect,
            "shards": self.shards,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "schemes": self.schemes,
            "groups": [{**asdict(group), "spread": spread(group)} for group in self.groups],
            "findings": [asdict(finding) for finding in self.findings],
            "loaders": [_row_to_json(row) for row in self.rows],
            "refusals": self.refusals,
        }


def inspect_model(
    model: Model,
    selection: Selection = "qkvz",
    *,
    platform: str | None = DEFAULT_PLATFORM,
    in_weights: Iterable[Finding] = (),
    profiles: Iterable[str] = PROFILES,
) -> Inspection:
    """Inspect a checkpoint. ``platform`` is where loaders compute with it; None: they load it only. ``in_weights`` is
    what was found by reading all weights; ``profiles`` are those that a conversion is planned with.

    Raises :class:`Refused` where the fused groups do not fit the config.
    """
    groups = model.select(selection)
    view = view_model(model, selection)
    converted, refusals = _after_convert(model, view, selection, profiles)
    rows = tuple(_row(loader, view, converted, platform) for loader in LOADERS)
    findings = [*find_faults(model, groups), *in_weights]
    checkpoint = model.checkpoint
    return Inspection(
        path=str(checkpoint.storage),
        selection=selection,
        model_type=model.model_type,
        dialect=model.dialect.name,
        shards=len(checkpoint.shards),
        tensors=len(checkpoint.tensors),
        nbytes=checkpoint.nbytes,
        schemes=_count_schemes(model),
        groups=view.groups,
        findings=tuple(findings),
        rows=rows,
        refusals=refusals,
        idle=tuple(profile for profile, after in converted.items() if after is not None and after.is_idle),
        platform=platform,
    )


@dataclass(frozen=True)
class _After:
    """What loaders see after a conversion, and by how much it moved the weights of partitions itself."""

    view: CheckpointView
    losses: Mapping[str, float]
    is_idle: bool


def _row(
    loader: Loader, view: CheckpointView, converted: Mapping[str, _After | None], platform: str | None
) -> LoaderRow:
    outcomes = {
        profile: None if after is None else _with_losses(loader.serves(after.view, platform), after.losses)
        for profile, after in converted.items()
    }
    if platform is None:
        return LoaderRow(loader, loader.serves(view, None), outcomes)
    kernels = {profile: loader.kernels(after.view, platform) for profile, after in converted.items() if after}
    return LoaderRow(loader, loader.serves(view, platform), outcomes, loader.kernels(view, platform), kernels)


def _with_losses(outcome: Outcome, losses: Mapping[str, float]) -> Outcome:
    """Also exact loaders serve what a conversion had to round."""
    if outcome.kind not in ("exact", "loses precision") or not losses:
        return outcome
    worst = max(losses.values())
    names = tuple(dict.fromkeys([*outcome.partitions, *losses]))
    detail = f"the conversion rounds: up to {worst:.1%} of each weight"
    return Outcome("loses precision", detail, names, max(worst, outcome.error))


def _after_convert(
    model: Model, view: CheckpointView, selection: Selection, profiles: Iterable[str]
) -> tuple[dict[str, _After | None], dict[str, str]]:
    """The checkpoint as loaders would see it after ``convert`` with each of ``profiles``, and why some profiles refuse:
    by the code that ``convert`` runs, but for laying out the shards."""
    views: dict[str, _After | None] = {}
    refusals: dict[str, str] = {}
    for profile in profiles:
        try:
            views[profile] = _view_after(model, view, profile, selection)
        except Refused as refusal:
            views[profile], refusals[profile] = None, refusal.what
    return views, refusals


def _view_after(model: Model, view: CheckpointView, profile: str, selection: Selection) -> _After:
    checked = plan_changes(model, profile, selection)
    after = view_model(checked.after, selection, view, checked.changed)
    return _After(after, checked.changes.repair.losses, not checked.changes.edits)


def _count_schemes(model: Model) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for module in model.modules.values():
        if not module.plain:
            counts[module.scheme.text if module.scheme else f"{module.weight.dtype} weights, scheme unknown"] += 1
    return dict(counts)


def _row_to_json(row: LoaderRow) -> dict[str, Any]:
    return {
        "loader": row.loader.name,
        "versions": row.loader.versions,
        "source": row.loader.source,
        "as_is": asdict(row.as_is),
        "converted": {profile: None if o is None else asdict(o) for profile, o in row.converted.items()},
        "kernels": _kernels_to_json(row.kernels),
        "kernels_converted": {profile: _kernels_to_json(used) for profile, used in row.kernels_converted.items()},
    }


def _kernels_to_json(kernels: tuple[Used, ...]) -> dict[str, list[str]]:
    return {used.card: list(used.families) for used in kernels}
