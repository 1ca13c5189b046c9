"""The check of every plan: the planned config and tensors, interpreted again, must mean what was meant.

No module but the planned ones changes its scheme, the planned ones get the planned scheme, and every scheme fits its
tensors. No profile can leave this out: what fails is refused before a byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rewrite.errors import Unsupported
from rewrite.ledger.fault import REFUSED, TITLES, Fault, is_finite
from rewrite.ledger.ledger import header_faults
from rewrite.ledger.names import is_vision
from rewrite.loaders.experts import expert_layers, is_expert
from rewrite.loaders.lookups import misread
from rewrite.planning.profiles.base import PlannedScheme
from rewrite.quantization.dialects.base import Dialect
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.groups import Module
from rewrite.quantization.model import Kind, Model
from rewrite.quantization.scheme import Scheme


def check_plan(before: Model, after: Model, planned: Mapping[str, PlannedScheme | None]) -> None:
    """Compare the checkpoint as it is with what a plan makes of it; ``planned`` are the modules that it changes.

    Raises :class:`Unsupported` for the first module whose scheme would not be what it must be.
    """
    if odd := before.kind_of.keys() ^ after.kind_of.keys():
        name = min(odd)
        raise _refusal(name, "the same modules", "one more" if name in after.kind_of else "none of this name")
    for new in after.kinds:
        others = [name for name in reversed(new.names) if name not in planned]
        alike = {id(before.kind_of[name]): name for name in others}  # the first of each kind
        for name in (*(name for name in new.names if name in planned), *alike.values()):
            _check_scheme(name, before.kind_of[name].first, new.first, planned)
    refuse_faults(after)
    _check_experts(before, after)
    _check_fused_names(before, after)
    _check_lookups(before, after)
    if before.second_dialect is not None and after.second_dialect is not None:
        _check_second(before.second_dialect, after.second_dialect, after.kind_of, planned)


def refuse_faults(model: Model) -> None:
    """Raise for the first fault that no conversion mends and that no engine survives: OUT would have it, too."""
    fault = next((fault for fault in header_faults(model) if fault.code in REFUSED), None)
    if fault is not None:
        what, hint = TITLES[fault.code], fault.next or None
        raise Unsupported(
            what[0].upper() + what[1:], where=fault.where, expected=fault.expected, found=fault.found, hint=hint
        )


def refuse_values(values: Iterable[Fault]) -> None:
    """Raise for the first scale of OUT that is no number: no engine serves what it scales. Vision towers that no sample
    of a calibration has reached have such scales, and serve text all the same."""
    fault = next((fault for fault in values if not is_finite(fault) and not is_vision(fault.tensor)), None)
    if fault is not None:
        raise Unsupported(
            "A scale is no number", where=fault.where, expected=fault.expected, found=fault.found, hint=fault.next
        )


def _check_scheme(name: str, old: Module, new: Module, planned: Mapping[str, PlannedScheme | None]) -> None:
    if name in planned:
        if not _is_as_planned(new.scheme, planned[name]):
            raise _refusal(name, _wording(planned[name]), _text(new.scheme))
    elif not _stays(old.scheme, new.scheme, plain=old.plain):
        raise _refusal(name, f"as it was: {_text(old.scheme)}", _text(new.scheme))


def _is_as_planned(scheme: Scheme | None, planned: PlannedScheme | None) -> bool:
    if scheme is None or planned is None:
        return scheme is None and planned is None
    return scheme.fp8 and (scheme.layout, scheme.activations) == planned


def _stays(old: Scheme | None, new: Scheme | None, *, plain: bool) -> bool:
    """Whether a module that the plan does not change is read as before.

    A plain matrix must not become quantized. Where the config gave it a scheme before, it is no linear layer
    (embeddings under the class ``Linear``) and any scheme is as good: no engine looks it up.
    """
    if plain:
        return old is not None or new is None
    if old is None or new is None:
        return old is None and new is None
    return old.means(new)


def _check_experts(before: Model, after: Model) -> None:
    """Engines have no scheme for experts with one scale a weight and activations per token, which is how ``fp8`` with
    dynamic activations is restated: vLLM and SGLang load the one, and raise on the other."""
    for kind in after.kinds:
        name, scheme = kind.names[0], kind.first.scheme
        if not is_expert(name) or scheme is None or not scheme.fp8 or scheme.layout != "tensor" or not scheme.per_token:
            continue
        olds = (before.kind_of[each].first.scheme for each in kind.names)
        if not all(old is not None and old.per_token for old in olds):
            raise Unsupported(
                "Engines would not load the experts any more",
                where=name,
                expected="one scale a weight with one for all tokens, or a scale for each row with one for each token",
                found=scheme.text,
            )
    if not isinstance(before.dialect, CompressedTensors) and isinstance(after.dialect, CompressedTensors):
        _check_inputs(before, after)


def _check_inputs(before: Model, after: Model) -> None:
    """``fp8`` and ModelOpt's dialect may have two input scales for gate and up of an expert, compressed-tensors not."""
    for old, new in zip(expert_layers(before), expert_layers(after), strict=True):
        if old.alike and not new.alike:
            raise Unsupported(
                "Engines would not load the experts any more",
                where=new.name,
                expected="one input_scale for gate and up of each expert, in compressed-tensors",
                found="two",
            )


def _check_fused_names(before: Model, after: Model) -> None:
    """Engines look a fused layer up under its own name first: it must agree with its modules wherever it did."""
    for group in before.groups.whole:
        kinds = [(before.kind_of[module.name], after.kind_of[module.name]) for module in group.modules]
        old, new = (model.dialect.scheme(group.name) for model in (before, after))
        was, now = [[each.first.scheme for each in kind] for kind in zip(*kinds, strict=True)]
        agreed = all(scheme == old for scheme in was)
        fitted = all(_layout(scheme) == _layout(old) for scheme in was)  # perhaps with other activations
        if (agreed and any(scheme != new for scheme in now)) or (
            fitted and any(_layout(scheme) != _layout(new) for scheme in now)
        ):
            raise _refusal(group.name, f"as its modules: {_text(now[0])}", _text(new))


def _layout(scheme: Scheme | None) -> str | None:
    return None if scheme is None else scheme.layout


def _check_lookups(before: Model, after: Model) -> None:
    """Engines look layers up by rules of their own: those that found the right scheme must still find it."""
    found = misread(after)
    if not found:
        return
    known = misread(before)
    for lookup, outcome in found.items():
        if lookup not in known:
            raise Unsupported("Engines would find another scheme in the new config", found=outcome.detail)


def _check_second(
    old: Dialect, new: Dialect, kinds: Mapping[str, Kind], planned: Mapping[str, PlannedScheme | None]
) -> None:
    """A second config that stays beside the first must say what it said, or what the first says now."""
    for name, kind in kinds.items():
        if name in planned:
            if planned[name] is None and new.scheme(name) is not None:
                raise _refusal(name, "not quantized, in hf_quant_config.json, too", "still listed there")
        elif not _agrees(new.scheme(name), old.scheme(name), kind.first.scheme):
            raise _refusal(name, "as it was, in hf_quant_config.json, too", _text(new.scheme(name)))


def _agrees(new: Scheme | None, old: Scheme | None, first: Scheme | None) -> bool:
    return new == old or (new is None) == (first is None)


def _refusal(where: str, expected: str, found: str) -> Unsupported:
    return Unsupported("The new config would change how a module is read", where=where, expected=expected, found=found)


def _text(scheme: Scheme | None) -> str:
    return scheme.text if scheme else "not quantized"


def _wording(planned: PlannedScheme | None) -> str:
    if planned is None:
        return "not quantized"
    return f"FP8 weights per {planned.layout}, {planned.activations} activations"
