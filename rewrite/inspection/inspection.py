"""Model → :class:`Inspection`. Reads headers, config and scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rewrite.checkpoint.bounded_json import read_members
from rewrite.checkpoint.checkpoint import Checkpoint
from rewrite.errors import Refused
from rewrite.ledger.fault import NOTES, SEVERITIES, Fault, Severity
from rewrite.loaders.kernels import DEFAULT_PLATFORM
from rewrite.loaders.layer import Layer
from rewrite.loaders.outcome import AS_IT_IS, Outcome, Row, gap
from rewrite.loaders.ranges import Engine
from rewrite.loaders.versions import LOADERS, Loader
from rewrite.loaders.views import CheckpointView, view_model
from rewrite.planning.check import refuse_values
from rewrite.planning.manifest import MANIFEST_NAME
from rewrite.planning.planner import Checked, plan_changes
from rewrite.planning.profiles import PROFILES
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import Model

_BEGIN = 1 << 16  # of a manifest: what a conversion costs stands at its begin

#: By how much of a checkpoint each changes: scales only; activations of the fused layers, of all; weights; everything.
LEAST_CHANGE = ("exact", "rescaled", "dynamic", "portable", "partition", "bf16", "dequantized")


def severity_of(outcome: Outcome) -> Severity | None:
    """Of what an engine makes of a checkpoint; None: it serves it exactly."""
    return _SEVERITY.get(outcome.kind)


_SEVERITY: Mapping[str, Severity] = {
    "garbled": "garbled", "fails to load": "fails", "does not run": "fails", "loses precision": "precision",
    "not known": "unknown",
}  # fmt: skip


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
    groups: tuple[Layer, ...]
    findings: tuple[Fault, ...]
    rows: tuple[Row, ...]
    refusals: dict[str, str]
    idle: tuple[str, ...] = ()  # profiles that would change nothing
    notes: tuple[Fault, ...] = ()  # worth knowing, and no fault
    platform: str | None = None  # what outcomes are about; None: loading only
    costs: dict[str, float] = field(default_factory=dict)  # of the conversion that made it: what a weight may be off by

    def affected(self, loaders: Iterable[Engine] = LOADERS) -> tuple[Row, ...]:
        """The rows of ``loaders`` that are known not to serve the checkpoint exactly as it is."""
        chosen = set(loaders)
        return tuple(row for row in self.rows if row.engine in chosen and gap(row.as_is, row.as_is))

    def fails_at(self, level: Severity, engines: Collection[Engine] = LOADERS) -> bool:
        """Whether a gate that is set to ``level`` stops this for ``engines``."""
        stopped = SEVERITIES[: SEVERITIES.index(level) + 1]
        rows = (severity_of(row.as_is) for row in self.rows if row.engine in engines)
        return any(each in stopped for each in (*rows, *(finding.severity for finding in self.findings)))

    @property
    def shown_profiles(self) -> list[str]:
        """Those worth a column: not refused; where they keep the scales, not idle; vectors only where they help."""
        left_out = {name for name in self.idle if PROFILES[name].promise.scale == "kept"}
        shown = [name for name in self.rows[0].converted if name not in left_out]
        vectors = [name for name in shown if PROFILES[name].promise.vectors]
        others = [name for name in shown if name not in vectors]
        return [name for name in shown if name in others or any(_helps(row, name, others) for row in self.rows)]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "platform": self.platform,
            "selection": self.selection,
            "judged": bool(self.groups),
            "model_type": self.model_type,
            "dialect": self.dialect,
            "shards": self.shards,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "schemes": self.schemes,
            "groups": [group.to_json() for group in self.groups],
            "findings": [fault.to_json() for fault in self.findings],
            "notes": [fault.to_json() for fault in self.notes],
            "engines": (rows := [_row_to_json(row, self.refusals) for row in self.rows]),
            "loaders": rows,
            "refusals": self.refusals,
            "costs": self.costs,
        }


def inspect_model(
    model: Model,
    selection: Selection | None = None,
    *,
    platform: str | None = DEFAULT_PLATFORM,
    in_weights: Iterable[Fault] = (),
    profiles: Iterable[str] = PROFILES,
    enough_for: Collection[Loader] | None = None,
) -> Inspection:
    """Inspect a checkpoint. ``selection`` None: :attr:`Groups.default`. ``platform`` is where loaders compute with it;
    None: they load it only. ``in_weights`` is
    what was found by reading all weights; ``profiles`` are those that a conversion is planned with.

    ``enough_for``: plan no more of them than advice for these loaders needs: none where all of these are exact already,
    else by the least change, up to the first that all of them are exact with. None: plan all.

    Raises :class:`Refused` where the fused groups do not fit the config.
    """
    selection = selection or model.groups.default
    view = view_model(model, selection)
    needed = enough_for is None or not _all_exact(enough_for, view, view, platform)
    some = profiles if enough_for is None else sorted(profiles, key=LEAST_CHANGE.index)
    converted, refusals = _after_convert(model, view, selection, some if needed else (), enough_for, platform)
    return _inspection(model, selection, platform, view, converted, refusals, in_weights)


def inspect_and_plan(
    model: Model, selection: Selection, enough_for: Collection[Loader], platform: str | None
) -> tuple[Inspection, dict[str, Checked]]:
    """As :func:`inspect_model` with ``enough_for``, but that one profile is planned where none is needed, too; with the
    changes of each that was planned, so that nobody plans them again."""
    view = view_model(model, selection)
    converted, refusals = _after_convert(model, view, selection, LEAST_CHANGE, enough_for, platform)
    planned = {profile: state.checked for profile, state in converted.items() if state.checked is not None}
    return _inspection(model, selection, platform, view, converted, refusals, ()), planned


def _inspection(
    model: Model,
    selection: Selection,
    platform: str | None,
    view: CheckpointView,
    converted: Mapping[str, _State],
    refusals: dict[str, str],
    in_weights: Iterable[Fault],
) -> Inspection:
    states = {AS_IT_IS: _State(view, {}), **converted}
    rows = tuple(_row(loader, states, platform) for loader in LOADERS)
    found = [*view.faults, *in_weights]
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
        findings=tuple(fault for fault in found if fault.code not in NOTES),
        notes=tuple(fault for fault in found if fault.code in NOTES),
        rows=rows,
        refusals=refusals,
        idle=tuple(profile for profile, after in converted.items() if after.is_idle),
        platform=platform,
        costs=_costs_of(checkpoint),
    )


def _costs_of(checkpoint: Checkpoint) -> dict[str, float]:
    """What rounding cost when this checkpoint was made, by its manifest: its own weights do not show it."""
    if MANIFEST_NAME not in checkpoint.files:
        return {}
    try:
        stated = read_members(checkpoint.storage, MANIFEST_NAME, ("costs",), first=_BEGIN).get("costs")
    except Refused:  # not a manifest of rewrite
        return {}
    found = stated.items() if isinstance(stated, dict) else ()
    return {name: float(cost) for name, cost in found if isinstance(cost, float) and 0 < cost < 1}


@dataclass(frozen=True)
class _State:
    """What loaders see, and by how much a conversion moved the weights of partitions itself. ``checked``: the changes
    that lead to it; None: as it is."""

    view: CheckpointView
    losses: Mapping[str, float]
    checked: Checked | None = None

    @property
    def is_idle(self) -> bool:
        return self.checked is not None and not self.checked.changes.any


def _row(loader: Loader, states: Mapping[str, _State], platform: str | None) -> Row:
    outcomes = {name: _with_losses(loader.serves(state.view, platform), state.losses) for name, state in states.items()}
    if platform is None:
        return Row(loader, outcomes)
    return Row(loader, outcomes, {name: loader.kernels(state.view, platform) for name, state in states.items()})


def _with_losses(outcome: Outcome, losses: Mapping[str, float]) -> Outcome:
    """Also exact loaders serve what a conversion had to round."""
    if outcome.kind not in ("exact", "loses precision") or not losses:
        return outcome
    worst = max(losses.values())
    names = tuple(dict.fromkeys([*outcome.partitions, *losses]))
    detail = f"the conversion rounds: up to {worst:.1%} of each weight"
    return Outcome("loses precision", detail, names, max(worst, outcome.error))


def _after_convert(
    model: Model,
    view: CheckpointView,
    selection: Selection,
    profiles: Iterable[str],
    enough_for: Collection[Loader] | None,
    platform: str | None,
) -> tuple[dict[str, _State], dict[str, str]]:
    """The checkpoint as loaders would see it after ``convert`` with each of ``profiles``, and why some profiles
    refuse."""
    views: dict[str, _State] = {}
    refusals: dict[str, str] = {}
    for profile in profiles:
        try:
            after = views[profile] = _view_after(model, view, profile, selection)
        except Refused as refusal:
            refusals[profile] = refusal.what
            continue
        if enough_for is not None and not after.losses and _all_exact(enough_for, view, after.view, platform):
            break
    return views, refusals


def _all_exact(loaders: Iterable[Loader], before: CheckpointView, after: CheckpointView, platform: str | None) -> bool:
    """Of all that is known of ``loaders``."""
    return not any(gap(loader.serves(before, platform), loader.serves(after, platform)) for loader in loaders)


def _helps(row: Row, profile: str, others: Iterable[str]) -> bool:
    """Whether the engine serves it better after this profile than as it is, and than after all ``others``."""
    rivals = (row.as_is, *(row.outcomes[name] for name in others))
    return all(row.outcomes[profile].severity < rival.severity for rival in rivals)


def _view_after(model: Model, view: CheckpointView, profile: str, selection: Selection) -> _State:
    """The checkpoint as loaders would see it after ``convert``: by the code that ``convert`` runs, but for laying out
    the shards."""
    checked = plan_changes(model, profile, selection)
    after = view_model(checked.after, selection, view, checked.changed, checked.dropped)
    refuse_values(after.faults)
    return _State(after, checked.changes.repair.losses, replace(checked, after=model))  # what it was is in the view


def _count_schemes(model: Model) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for kind in model.kinds:
        if not (first := kind.first).plain:
            text = first.scheme.text if first.scheme else f"{first.weight.dtype} weights, scheme unknown"
            counts[text] += len(kind.names)
    return dict(counts)


def _row_to_json(row: Row, refused: Iterable[str]) -> dict[str, Any]:
    kernels = {state: {card: list(names) for card, names in used.items()} for state, used in row.kernels.items()}
    return {
        "engine": row.engine.name,
        "loader": row.engine.name,
        "versions": row.engine.versions,
        "source": row.engine.source,
        "severity": severity_of(row.as_is),
        "as_is": asdict(row.as_is),
        "converted": {**dict.fromkeys(refused), **{name: asdict(each) for name, each in row.converted.items()}},
        "kernels": kernels.pop(AS_IT_IS, {}),
        "kernels_converted": kernels,
    }
