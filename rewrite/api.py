"""What users call, from Python and from the command line: open, inspect, plan, convert, verify."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from rewrite.checkpoint.checkpoint import Checkpoint, read_checkpoint
from rewrite.checkpoint.storage import Storage
from rewrite.conversion import Conversion, absolute, address_of
from rewrite.errors import UsageError
from rewrite.inspection.advice import choose
from rewrite.inspection.inspection import Inspection, inspect_model
from rewrite.integrations.addresses import Address, open_storage, scheme_of
from rewrite.ledger.fault import Fault
from rewrite.loaders.asked import NEWEST
from rewrite.loaders.kernels import DEFAULT_PLATFORM, PLATFORMS, is_platform
from rewrite.loaders.versions import LOADERS, Loader
from rewrite.loaders.views import CheckpointView, view_model
from rewrite.planning import planner
from rewrite.planning.manifest import Manifest
from rewrite.planning.plan import Plan
from rewrite.planning.profiles import PROFILES
from rewrite.progress import Progress
from rewrite.quantization.groups import Selection
from rewrite.quantization.kv_cache import KvScales
from rewrite.quantization.model import interpret
from rewrite.verification.expected import Expected
from rewrite.verification.result import DEFAULT_TOKENS, IN, OUT, Check, EngineChange, OnCheck, Settings, Verification
from rewrite.verification.sample import DEFAULT_ROWS

DEFAULT_WORKERS = 2


def open_checkpoint(path: Address) -> Checkpoint:
    """Open the checkpoint ``path`` and check index and headers against each other, both ways.

    ``path`` is a directory, a model on the Hugging Face hub (``org/name[@revision]`` where there is no such directory,
    or ``hf://org/name[@revision]``), or a :class:`Storage`.

    Raises :class:`rewrite.errors.Refused` for what does not add up and :class:`rewrite.errors.StorageError` for what
    cannot be read.
    """
    return read_checkpoint(open_storage(path))


def inspect_checkpoint(
    path: Address,
    *,
    selection: Selection | None = None,
    weights: bool = False,
    platform: str | None = DEFAULT_PLATFORM,
    enough_for: Collection[Loader] | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
) -> Inspection:
    """Say what the checkpoint ``path`` is, what is wrong with it and what every known loader makes of it.

    ``path`` is what :func:`open_checkpoint` takes.

    ``selection``: the fused layers to look at, and to convert for the "after convert" columns, as for :func:`convert`.
    ``platform`` is where loaders compute with it: keys of :data:`PLATFORMS`, joined by commas; None: they load it only.
    ``enough_for``: plan no more profiles than advice for these loaders needs, by the least change; None: plan all.
    Reads headers, config and scales; with ``weights`` ``workers`` also read every weight and look for NaN codes, rows
    of nothing but zeros and codes that hardly use their range, and ``progress`` is about these bytes. Raises
    :class:`rewrite.errors.Refused` for a checkpoint that does not add up and :class:`rewrite.errors.StorageError` for
    one that cannot be read.
    """
    _known_platform(platform)
    model = interpret(open_checkpoint(path))
    found: list[Fault] = []
    if weights:
        from rewrite.inspection.weights import find_bad_weights  # numpy

        found = find_bad_weights(model.checkpoint, workers=workers, progress=progress)
    return inspect_model(model, selection, platform=platform, in_weights=found, enough_for=enough_for)


def _known_platform(platform: str | None) -> None:
    if platform is not None and not is_platform(platform):
        raise UsageError("Unknown platform", expected=", ".join(PLATFORMS), found=platform)


def make_plan(
    checkpoint: Checkpoint,
    profile: str | None = "exact",
    selection: Selection | None = None,
    kv_scales: KvScales = "keep",
    engines: Collection[Loader] = NEWEST.engines,
    platform: str = DEFAULT_PLATFORM,
) -> Plan:
    """What :func:`convert` would do, as data. Raises as :func:`convert`; writes nothing."""
    _known_platform(platform)
    model = interpret(checkpoint)
    selection = selection or model.groups.default
    if profile is not None:
        return planner.make_plan(model, profile, selection, kv_scales)
    choice = choose(model, selection, engines, platform)
    return planner.make_plan(model, choice.profile, selection, kv_scales, choice.chosen, choice.notes, choice.checked)


def plan_conversion(
    src: Address,
    dst: str | os.PathLike[str],
    *,
    profile: str | None = "exact",
    selection: Selection | None = None,
    kv_scales: KvScales = "keep",
    engines: Collection[Loader] = NEWEST.engines,
    platform: str = DEFAULT_PLATFORM,
    overwrite: bool = False,
    copy: bool = False,
    created: str | None = None,
    create_pr: bool = False,
) -> Conversion:
    """What :func:`convert` would do, to be carried out in parts: ``run_part`` of the result, also on other machines,
    then ``finish``. ``save`` and ``Conversion.load`` bring it there. Arguments and errors as of :func:`convert`.
    """
    make = partial(
        make_plan, profile=profile, selection=selection, kv_scales=kv_scales, engines=engines, platform=platform
    )
    return _planned(make, src, dst, overwrite=overwrite, copy=copy, created=created, create_pr=create_pr)


def _planned(make: Callable[[Checkpoint], Plan], src: Address, dst: str | os.PathLike[str], **how: Any) -> Conversion:
    scheme_of(dst)  # refuses what is not written, before anything is read
    storage = open_storage(src)
    return Conversion(make(open_checkpoint(storage)), address_of(storage), absolute(dst), storage=storage, **how)


def convert(
    src: Address,
    dst: str | os.PathLike[str],
    *,
    profile: str | None = "exact",
    selection: Selection | None = None,
    kv_scales: KvScales = "keep",
    engines: Collection[Loader] = NEWEST.engines,
    platform: str = DEFAULT_PLATFORM,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    copy: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
    create_pr: bool = False,
    on_plan: Callable[[Plan], object] | None = None,
    check: Callable[[Storage, Storage], object] | None = None,
) -> Manifest:
    """Convert the checkpoint ``src`` into the new directory ``dst``, the new prefix ``s3://bucket/prefix`` or the model
    ``hf://org/name``, and say what changed.

    ``src`` is what :func:`open_checkpoint` takes. Between two places of one store, the store copies what does not
    change. A model of the hub is downloaded through the cache of huggingface_hub. ``create_pr`` makes a pull request
    to an output on the hub.
    ``profile`` is a key of :data:`PROFILES`; None: the one that makes ``src`` exact in ``engines`` on ``platform`` with
    the least change, as :func:`inspect_checkpoint` and ``rewrite inspect`` advise; the manifest notes it.
    ``selection`` "all" is about every fused layer, "qkvz" about ``in_proj_qkvz`` only; None: that, or "all" in a model
    without this layer.
    ``kv_scales`` "drop" leaves out the scales of an FP8 KV cache; ``dequantized`` always does.
    ``dst`` is absent or complete, never in between; the same call after an interruption resumes. ``workers`` files are
    written at a time; ``overwrite`` replaces an existing ``dst`` at the very end; without ``copy``, blocks are shared
    with ``src`` where the filesystem can; ``created`` is a time to note in the manifest; ``progress(done, total)`` is
    called with bytes. ``executor``, any of :mod:`concurrent.futures`, writes the files in place of threads: its workers
    must see ``src`` and the parent of ``dst``. ``on_plan`` is called with the plan before anything is written,
    and ``check`` with ``src`` and the complete output before anybody can see it: what it raises keeps it unpublished.
    ``counts`` of the result says how many bytes were shared, copied and written.

    Raises :class:`rewrite.errors.Refused` for a checkpoint that cannot be converted with certainty (before anything is
    written), :class:`rewrite.errors.UsageError` for arguments that make no sense and
    :class:`rewrite.errors.StorageError` when reading or writing fails.
    """
    make = partial(
        make_plan, profile=profile, selection=selection, kv_scales=kv_scales, engines=engines, platform=platform
    )
    conversion = _planned(make, src, dst, overwrite=overwrite, copy=copy, created=created, create_pr=create_pr)
    if on_plan is not None:
        on_plan(conversion.plan)
    if executor is None:
        conversion = conversion.downloaded(workers, progress, make)
    return conversion.publish(workers, progress, executor, check)


def publish_plan(
    plan: Plan,
    src: Address,
    dst: str | os.PathLike[str],
    *,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
    copy: bool = False,
    created: str | None = None,
    progress: Progress | None = None,
    executor: Executor | None = None,
) -> Manifest:
    """Carry out what :func:`make_plan` has planned. Arguments and errors as of :func:`convert`."""
    storage = open_storage(src)
    conversion = Conversion(plan, address_of(storage), absolute(dst), overwrite, copy, created, storage=storage)
    return conversion.publish(workers, progress, executor)


def verify(
    src: Address,
    dst: Address,
    *,
    device: str = "auto",
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    rows: int | None = DEFAULT_ROWS,
    quick: bool = False,
    weights_only: bool = False,
    digest: bool = False,
    loader: Loader | None = None,
    engines: Collection[Loader] | None = None,
    platform: str | None = None,
    workers: int = DEFAULT_WORKERS,
    progress: Progress | None = None,
    on_check: OnCheck | None = None,
    executor: Executor | None = None,
) -> Verification:
    """Prove that ``dst`` is ``src`` converted: the same weights, nothing else changed, outputs as the fixed loader's.

    ``device`` (auto, cpu, cuda, cuda:N) multiplies ``tokens`` activations made from ``seed`` with ``rows`` of each
    partition (None: all of them). Weights and all other bytes are compared in full, in one pass over the files, which
    ``workers`` read; ``progress`` is about these bytes, and then about the rows that are multiplied. With ``digest``
    the same pass notes the SHA-256 of each file of ``dst``. ``quick`` makes no such pass: of the weights of the fused
    groups it compares ``rows`` of each partition, and no other bytes. ``weights_only`` multiplies nothing and does not
    compare what the config says of layers: it needs neither torch nor compressed-tensors. ``on_check`` is called as a
    check begins (its name, None), and ends (its name, the :class:`Check`). ``executor``, any of
    :mod:`concurrent.futures`, reads the files and multiplies the groups: its workers must see both checkpoints, and
    have the ``device``.

    ``engines`` are those that ``dst`` is for: they must serve it on ``platform``, a key of :data:`PLATFORMS` (None:
    CUDA), and none of them worse than ``src``. None: ``loader``, or no known engine may load it worse; with a
    ``platform`` all must compute with it, too. ``loader`` is the one whose outputs are computed (None: one with the fix
    of issue #38197).

    Raises :class:`rewrite.errors.Refused` for a source that does not add up, :class:`rewrite.errors.UsageError` for a
    device that is not there, or options that exclude each other, and :class:`rewrite.errors.StorageError` for a file
    that cannot be read or changes meanwhile. Whatever is wrong with ``dst`` is a failed check of the result.
    """
    _known_platform(platform)
    if not weights_only and find_spec("torch") is None:
        raise UsageError(
            "Outputs are multiplied with torch, which is not installed", expected="torch",
            hint="install it (README.md: Install), or compare weights only: --weights-only",
        )  # fmt: skip
    from rewrite.verification.run import Request, choose_device, verify_storages  # numpy, perhaps torch

    if digest and quick:
        raise UsageError(
            "Digests need every byte of OUT, and quick does not read them all", hint="leave one of them out"
        )
    settings = Settings(
        device="none" if weights_only else choose_device(device),
        tokens=tokens,
        seed=seed,
        loader=f"{loader.name} {loader.versions}" if loader else "fixed",
        every_slot=loader is None or not loader.fills_slot_zero_only,
        platform=platform or DEFAULT_PLATFORM,
        rows=rows,
        quick=quick,
        weights_only=weights_only,
    )
    promises = {profile.name: profile.promise for profile in PROFILES.values()}
    asked = tuple(engines) if engines is not None else (loader,) if loader else ()
    must_run = asked or (LOADERS if platform else ())
    predict = partial(_predict, platform=settings.platform, must_run=must_run, asked=asked)
    request = Request(promises, predict, settings, digest, workers, progress, on_check or _nobody, executor)
    return verify_storages(open_storage(src), open_storage(dst), request)


def _nobody(_name: str, _check: Check | None) -> None:
    """Who watches where nobody does."""


def _predict(
    source: Checkpoint,
    out: Checkpoint,
    expected: Expected,
    *,
    platform: str,
    must_run: Collection[Loader],
    asked: Collection[Loader],
) -> tuple[EngineChange, ...]:
    """What every known loader makes of IN and OUT; nothing where there is no layer to judge. Of those of ``must_run``
    OUT must be computed with, too."""
    models = [interpret(checkpoint) for checkpoint in (source, out)]
    views = [view_model(model, expected.selection) for model in models]
    changes = [_change(loader, views, expected, platform, loader in must_run) for loader in LOADERS]
    judged = any(view.groups for view in views) or any(row.outcomes[OUT].kind != "exact" for row in changes)
    return tuple(replace(change, asked=change.engine in asked) for change in changes) if judged else ()


def _change(
    loader: Loader, views: Sequence[CheckpointView], expected: Expected, platform: str, must_run: bool
) -> EngineChange:
    old, new = (loader.serves(view, platform if must_run else None) for view in views)
    runs_before, running = (loader.serves(view, platform) for view in views)
    judged = loader.takes_vectors or not expected.promise.vectors
    change = 0 if old.kind == "not known" else new.severity - old.severity
    if old.kind == "garbled" and change > 0:
        change = 0  # an error instead of garbage that nobody is told of: not worse
    stops = running.kind == "does not run"
    if must_run and stops:
        change = max(change, 1)  # also where IN does not run
    stopped = stops and runs_before.kind in ("exact", "loses precision")
    kernels = {state: loader.kernels(view, platform) for state, view in zip((IN, OUT), views, strict=True)}
    return EngineChange(
        loader, {IN: old, OUT: running if stops else new}, kernels,
        judged=judged, change=change, does_not_run=stops, stopped=stopped,
    )  # fmt: skip
