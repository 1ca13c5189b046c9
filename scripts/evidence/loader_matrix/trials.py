"""A recipe becomes trials: the checkpoint itself, and what each profile makes of it, with all that ``rewrite`` says.

No engine is needed for this. What ``rewrite`` says of one checkpoint in two places is compared here already:
``inspect`` of IN promises what ``convert`` does, and what engines make of OUT; ``verify`` holds OUT, and fails a
damaged copy of it.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import rewrite
from loader_matrix.damage import damaged
from loader_matrix.truth import Truth, canonical
from rewrite.loaders.versions import find_loaders
from rewrite.loaders.views import view_model
from rewrite.quantization.model import interpret
from rewrite.trying.driver import Checkpoint

ORIGINAL = "original"
_READ_BY_ENGINES = ("*.safetensors", "config.json", "hf_quant_config.json", "*.index.json")


@dataclass(frozen=True)
class Trial:
    """One checkpoint to load. ``predictions``: NAME==VERSION → kind of outcome."""

    name: str
    profile: str
    folder: Path
    truth: Path
    predictions: dict[str, str]
    digest: str  # of all that engines read

    @property
    def label(self) -> str:
        return f"{self.name} {self.profile}"


@dataclass
class Tried:
    """What a recipe came to: its trials; disagreements as (profile, who, what); and counts of what was done."""

    name: str
    trials: list[Trial] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def count(self, what: str) -> None:
        self.counts[what] += 1


Seed = int


def attempt(source: Path, folder: Path, engines: Sequence[str], seed: Seed, profiles: Sequence[str] | None) -> Tried:
    """The checkpoint at ``source``, and its conversions below ``folder``. ``profiles``: all, if None."""
    tried = Tried(source.name)
    selection: rewrite.Selection = "qkvz" if seed % 4 == 3 else "all"
    with _tracebacks(tried, ORIGINAL):
        tried.trials.append(Trial(source.name, ORIGINAL, source, source, predict(source, engines), digest(source)))
        if (module := misread(source)) is not None:
            tried.problems.append((ORIGINAL, "try", f"reads another weight of {module} than the files say"))
    inspection: rewrite.Inspection | str = "no inspection"
    with _tracebacks(tried, ORIGINAL):
        inspection = _inspected(source, selection)
    for number, profile in enumerate(rewrite.PROFILES if profiles is None else profiles):
        with _tracebacks(tried, profile):
            out = folder / f"{source.name}-{profile}"
            if _converted(tried, inspection, source, out, profile, selection):
                _promised(tried, inspection, out, profile, selection)
                _verified(tried, source, out, profile)
                _damaged(tried, source, out, profile, seed * len(rewrite.PROFILES) + number)
                predictions = predict(out, engines)
                truth = out if _is_repaired(out) else source
                tried.trials.append(Trial(source.name, profile, out, truth, predictions, digest(out)))
    return tried


def _is_repaired(out: Path) -> bool:
    """Whether NVFP4 layers got one global scale: factors moved between layers, so engines are held to what OUT says."""
    manifest = out / "rewrite_manifest.json"
    return manifest.exists() and "global_scales" in json.loads(manifest.read_text())


@contextmanager
def _tracebacks(tried: Tried, profile: str) -> Iterator[None]:
    """An exception that ``rewrite`` does not document is a disagreement: it is noted, and the search goes on."""
    try:
        yield
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        tried.problems.append((profile, "traceback", f"{type(error).__name__}: {error} ({place})"))


def misread(folder: Path) -> str | None:
    """A module of which the driver of `try` reads another weight, or another scale of activations, than ``Truth``: that
    knows no code of ``rewrite``."""
    truth, source = Truth(folder), Checkpoint(folder)
    plain = {canonical(name.removesuffix(".weight")): weight for name, weight in source.plain(whole=True)}
    stated = {
        canonical(name.removesuffix("_packed").removesuffix(".weight")): source.input_scale(name)
        for name in source.shards
        if name.endswith(("weight", "weight_packed"))
    }
    for module in sorted(truth.quantized()):
        try:
            linear = truth.linear(module)
        except KeyError:  # without its scale it means nothing: to `try` neither
            if module in plain:
                return module
            continue
        same = module in plain and torch.allclose(plain[module], linear.weight, 0, 0, equal_nan=True)
        if not same or str(stated[module]) != str(linear.input_scale):  # NaN is NaN
            return module
    return None


def _inspected(folder: Path, selection: rewrite.Selection) -> rewrite.Inspection | str:
    """What inspect says, or why it refuses."""
    try:
        return rewrite.inspect_checkpoint(folder, selection=selection, platform=None)  # engines only load here
    except rewrite.Refused as refusal:
        return refusal.what


def _converted(
    tried: Tried,
    inspection: rewrite.Inspection | str,
    source: Path,
    out: Path,
    profile: str,
    selection: rewrite.Selection,
) -> bool:
    """Whether there is an OUT that differs from IN; ``inspect`` has to have said the same."""
    promised = inspection if isinstance(inspection, str) else inspection.refusals.get(profile)
    try:
        changed = rewrite.convert(source, out, profile=profile, selection=selection).changed
    except rewrite.Refused as refusal:
        tried.count("conversions refused")
        if promised != refusal.what:
            tried.problems.append((profile, "inspect", f"says {promised!r}, convert {refusal.what!r}"))
        return False
    if promised is not None:
        tried.problems.append((profile, "inspect", f"says {promised!r}, convert converts"))
    tried.count("conversions" if changed else "conversions with nothing to do")
    return bool(changed)


def _promised(
    tried: Tried, inspection: rewrite.Inspection | str, out: Path, profile: str, selection: rewrite.Selection
) -> None:
    """``inspect`` of IN says of each loader what ``inspect`` of OUT says."""
    if isinstance(inspection, str):
        return  # a disagreement that is noted already: convert converted
    view = view_model(interpret(rewrite.open_checkpoint(out)), selection)
    for loader, row in zip(rewrite.LOADERS, inspection.rows, strict=True):
        promised, now = row.outcomes.get(profile), loader.predict(view)
        if promised is not None and promised.detail.startswith("the conversion rounds") and now.kind == "exact":
            continue  # OUT is served as it is; what was lost on the way is for inspect of IN to say
        if promised is not None and promised.kind != now.kind:
            said = f"promises {promised.kind}, and of OUT says {now.kind}"
            tried.problems.append((profile, "inspect", f"{loader.name} {loader.versions}: {said}"))


def _verified(tried: Tried, source: Path, out: Path, profile: str) -> None:
    tried.count("verified")
    if (problem := _problem_of(source, out)) is not None:
        tried.problems.append((profile, "verify", f"fails what convert wrote: {problem}"))


def _damaged(tried: Tried, source: Path, out: Path, profile: str, seed: Seed) -> None:
    copy = out.with_name(f"{out.name}-damaged")
    what = damaged(out, copy, seed)
    if what is None:
        return
    tried.count("damages")
    if _problem_of(source, copy) is None:
        tried.problems.append((profile, "verify", f"holds a damaged OUT: {what}"))


def _problem_of(source: Path, out: Path) -> str | None:
    """What the verification finds first."""
    result = rewrite.verify(source, out, device="cpu", tokens=2)
    if result.ok:
        return None
    return next(problem for check in result.checks for problem in check.problems)[:300]


def predict(folder: Path, engines: Sequence[str]) -> dict[str, str]:
    """The kind of outcome for each engine, all groups looked at; "refused" where rewrite refuses the checkpoint.

    As ``inspect`` predicts it, without its plan of every profile.
    """
    try:
        view = view_model(interpret(rewrite.open_checkpoint(folder)), "all")
    except rewrite.Refused:
        return dict.fromkeys(engines, "refused")
    kinds: dict[str, str] = {}
    for spec in engines:
        name, _, version = spec.partition("==")
        (loader,) = find_loaders(f"{name}@{version}")
        kinds[spec] = loader.predict(view).kind
    return kinds


def digest(folder: Path) -> str:
    """Of the names and bytes of all that engines read: checkpoints with the same one need to be loaded once only."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in _READ_BY_ENGINES for path in folder.glob(pattern)}):
        found.update(f"{path.name} {path.stat().st_size} ".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
