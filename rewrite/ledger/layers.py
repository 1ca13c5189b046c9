"""What is wrong in the layers: their tensors against what the config says of them. Headers and config only.

What is alike is looked at once: a checkpoint has 300,000 tensors and a few dozen kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rewrite.checkpoint.forms import Form
from rewrite.ledger.fault import AGAIN, Code, Fault
from rewrite.ledger.formats import FORMATS, FP8, SCALE_NAMES, Format, Scale
from rewrite.ledger.names import LINEARS, is_mtp, is_router, is_vision
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.fp8 import Fp8
from rewrite.quantization.dialects.modelopt import ModelOpt
from rewrite.quantization.dialects.modelopt_mixed import ModelOptMixed
from rewrite.quantization.dialects.other import Other
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.dtypes import FP8_DTYPES
from rewrite.quantization.groups import WEIGHTS, is_table
from rewrite.quantization.model import Kind, Model
from rewrite.quantization.scheme import Scheme

#: Families whose own format keeps the experts of a layer in one tensor with three dimensions (vLLM ``step3p5.py``,
#: ``llama4.py``, ``gpt_oss.py``).
_STACKED = ("step3p5", "step3p7", "step3_text", "llama4", "llama4_text", "gpt_oss")
_EXPERTS = re.compile(r"(?:.*\.)?(?:experts|moe)(?:\.\w+)?")
#: Of integers and of other quantizers. vLLM 0.32.0 was run with FP8 layers that have the first or the zero point or the
#: order of a weight: ValueError, no such parameter.
_SIDE = frozenset(
    ("pre_quant_scale", "qweight", "qzeros", "scales", "g_idx", "weight_zero_point", "weight_g_idx", "input_zero_point")
)
_WRAPPED = re.compile(r"base_model\.model\.|module\.|_orig_mod\.|_fsdp_wrapped_module\.")
_UNWRAP = "save the model itself, not its wrapper"
_DEQUANTIZE = "`rewrite convert IN OUT --profile dequantized` writes plain weights"
_SPECULATIVE = "leave these layers out: only speculative decoding needs them, and it fails or garbles"
_LABELS = ("label", "no-scale", "scale-shape", "no-input-scale", "no-role")
_ALL_OR_NONE = "engines fuse these layers with others that are quantized: quantize all of them, or none"
_REPAIRED = "`rewrite convert IN OUT` lists these layers in ignore"


def layer_faults(model: Model) -> Iterator[Fault]:
    """Layers whose tensors are not those that their scheme asks for, and tensors that belong to no layer."""
    yield from _no_config(model)
    yield from _wrapped(model)
    text = text_config(model.checkpoint.config.value)
    for kind in model.kinds:
        of_mtp = is_mtp(kind.names[0], text)
        for fault in _of_kind(kind, model):
            yield replace(fault, code="mtp-label", next=_SPECULATIVE) if of_mtp and fault.code in _LABELS else fault
    for form, names in model.checkpoint.alike.items():
        yield from _of_form(form, names, model)


def _no_config(model: Model) -> Iterator[Fault]:
    """FP8 weights of a model whose config was lost: nobody multiplies with their scales."""
    quantized = [kind for kind in model.kinds if kind.first.fp8]
    if isinstance(model.dialect, Other) and not model.dialect.value and quantized:
        found = f"{sum(len(kind.names) for kind in quantized):,} layers in {quantized[0].first.weight.dtype}"
        yield Fault("no-config", quantized[0].names[0], found, "a quantization_config in config.json", _DEQUANTIZE)


def _wrapped(model: Model) -> Iterator[Fault]:
    """Names that PEFT, DDP, FSDP or torch.compile put before those of the model: no engine looks for these."""
    names = [
        name for form, all_names in model.checkpoint.alike.items() if _WRAPPED.match(form.pattern) for name in all_names
    ]
    if names:
        wrapper = _WRAPPED.match(names[0])[0]  # type: ignore[index]
        yield Fault("wrapped-name", names[0], wrapper, "the names of the model", _UNWRAP, len(names))


def _of_kind(kind: Kind, model: Model) -> Iterator[Fault]:
    scheme, first, count = kind.first.scheme, kind.first, len(kind.names)
    if isinstance(model.dialect, Other):
        return
    if first.plain:
        yield from _plain(kind, model)
    elif scheme is None and not is_table(kind.form.pattern):
        # Other formats beside the one that a config states were never seen; FP8 that it leaves alone was.
        found = f"{first.weight.dtype} weights"
        yield Fault("label", kind.names[0], found, "what the config says: not quantized", AGAIN, count)
    elif scheme is not None and (scheme.format in FORMATS or first.weight.dtype in FP8_DTYPES):
        yield from _stored(kind, scheme, model)
    yield from _without_role(kind)
    if scheme is not None and scheme.format == "FP8" and not first.plain:
        yield from _by_another_name(kind, scheme, model)
    if scheme is not None and scheme.activations == "none" and "input_global_scale" in kind.form.tensors:
        # vLLM 0.32.0 raises, SGLang 0.5.23 leaves it out; of ModelOpt's input_scale both do
        where = f"{first.name}.input_global_scale"
        yield Fault("scale-name", where, "input_global_scale", f"no such scale of {scheme.text}", AGAIN, count)
    if not first.plain and is_router(kind.form.pattern):
        yield Fault(
            "router", kind.names[0], f"{first.weight.dtype} weights", "a router in the dtype of the model", AGAIN, count
        )


def _without_role(kind: Kind) -> Iterator[Fault]:
    """Scales beside a weight whose format has none of that name: engines look them up and find no place."""
    scheme, weight = kind.first.scheme, kind.first.weight
    forms = FORMATS.get(scheme.format, ()) if scheme is not None and not kind.first.plain else ()
    if not forms and not kind.first.plain:
        return  # a format that is not read
    name = weight.name.rpartition(".")[2]
    named = {each for form in forms if name in form.weights for scale in form.scales for each in scale.names}
    for scale in (scale for form in forms if name in form.weights for scale in form.scales):
        if len(twice := [each for each in scale.names if each in kind.form.tensors]) > 1:
            yield Fault("no-role", f"{kind.names[0]}.{twice[1]}", twice[1], f"{twice[0]} alone", AGAIN, len(kind.names))
    others = SCALE_NAMES.difference(named, ("scale",)).intersection(kind.form.tensors)
    if scheme is not None and forms and scheme.format in ("FP8", "NVFP4"):
        others |= _SIDE.intersection(kind.form.tensors)
    for odd in sorted(others):
        expected = f"the scales of {scheme.text}" if scheme and forms else "no scale beside plain weights"
        yield Fault("no-role", f"{kind.names[0]}.{odd}", odd, expected, AGAIN, len(kind.names))


def _by_another_name(kind: Kind, scheme: Scheme, model: Model) -> Iterator[Fault]:
    """Engines look for ``weight_scale`` and, of static activations, ``input_scale``; with ``quant_method: fp8`` for
    ``weight_scale_inv`` of blocks, and for Mistral's two names in its models (Ministral, Pixtral, ...). vLLM 0.32.0
    raises on any other."""
    names = {"weight_scale", "input_scale"} if scheme.activations == "static" else {"weight_scale"}
    if isinstance(model.dialect, Fp8):
        if scheme.layout == "block":
            names = {"weight_scale_inv", "scale"}
        elif "tral" in str(model.checkpoint.config.value.get("model_type")):
            names |= {"weight_scale_inv", "activation_scale"}
    elif scheme.layout == "block" or not isinstance(model.dialect, (CompressedTensors, ModelOpt, ModelOptMixed)):
        return
    for own in ([name for name in scale.names if name in kind.form.tensors] for scale in FP8.scales):
        if len(own) != 1 or own[0] in names:  # two are another fault
            continue
        expected = f"{' and '.join(sorted(names))} of {scheme.text}"
        hint = "`rewrite convert IN OUT --profile dequantized` leaves no scale; or export the model again"
        yield Fault("scale-name", f"{kind.names[0]}.{own[0]}", own[0], expected, hint, len(kind.names))


def plain_layers(model: Model) -> Iterator[str]:
    """The layers that the config quantizes, or engines by it, and that are stored plain."""
    for kind in model.kinds:
        if kind.first.plain and _is_linear(kind, model):
            yield from kind.names if kind.first.scheme is not None else dict(_by_fused_name(kind, model))


def _by_fused_name(kind: Kind, model: Model) -> Iterator[tuple[str, str]]:
    """The layers of a kind that the config leaves alone, each with what engines fuse it to and the config does not."""
    if not isinstance(model.dialect, ModelOpt):
        return
    names = set(kind.names)
    for group in (group for group in model.groups.whole if len(group.modules) > 1 and group.modules[0].plain):
        parts = [module.name for module in group.modules]
        if not names.isdisjoint(parts) and not model.dialect.leaves_alone(group.name, parts):
            yield from ((part, group.name) for part in parts if part in names)


def _plain(kind: Kind, model: Model) -> Iterator[Fault]:
    """Plain weights of a layer that the config quantizes: engines make scales up, or cast the weights."""
    scheme = kind.first.scheme
    if not _is_linear(kind, model):
        return
    if scheme is None:
        yield from _matched_in_parts(kind, model)
        return
    expected = f"what the config says: {scheme.text}"
    found = f"{kind.first.weight.dtype} weights"
    mtp = [name for name in kind.names if is_mtp(name, text_config(model.checkpoint.config.value))]
    others = [name for name in kind.names if name not in set(mtp)] if mtp else kind.names
    if mtp:
        hint = f"{_REPAIRED}; else speculative decoding, which alone loads them, fails or garbles"
        yield Fault("mtp-format", mtp[0], found, expected, hint, len(mtp))
    if others:
        fused = _fused_name(others[0], model)
        code: Code = "fused-name" if fused is not None and _is_listed(fused, model) else "plain-layer"
        hint = _ALL_OR_NONE if fused is not None and _is_torn(fused, model) else _REPAIRED
        yield Fault(code, others[0], found, expected, hint, len(others))


def _matched_in_parts(kind: Kind, model: Model) -> Iterator[Fault]:
    layers = list(_by_fused_name(kind, model))
    for name, fused in layers[:1]:
        scheme = model.dialect.scheme(fused)
        expected = f"plain, not {scheme.text if scheme else ''}"
        yield Fault("ignore-pattern", name, f"no entry for {fused}", expected, _REPAIRED, len(layers))


def _is_torn(fused: str, model: Model) -> bool:
    return any(not module.plain for group in model.groups.whole if group.name == fused for module in group.modules)


def _is_listed(fused: str, model: Model) -> bool:
    """Whether the config leaves this very name alone, and not every name that it does not know."""
    return model.dialect.scheme(fused) is None and model.dialect.scheme(f"{fused}_") is not None


def _is_linear(kind: Kind, model: Model) -> bool:
    """Whether engines are sure to quantize it. Not: embeddings, heads, routers, vision towers (several of them do not
    look these up), and what no format and no family has a name for."""
    pattern = kind.form.pattern
    if is_table(pattern) or is_router(pattern) or is_vision(pattern) or pattern.endswith("head"):
        return False
    if pattern.startswith("mtp."):
        return True
    own = pattern.rpartition(".")[2]
    if own in LINEARS or any(own in group.layer.modules for group in model.groups.whole):
        return True
    others = [other.form.pattern.rpartition(".")[2] for other in model.kinds if not other.first.plain]
    return own in others or not others


def _fused_name(name: str, model: Model) -> str | None:
    groups = (group for group in model.groups.whole if len(group.modules) > 1)
    return next((group.name for group in groups if any(module.name == name for module in group.modules)), None)


def _stored(kind: Kind, scheme: Scheme, model: Model) -> Iterator[Fault]:
    """A quantized layer against the table of formats."""
    weight = kind.first.weight
    name, count, where = weight.name.rpartition(".")[2], len(kind.names), kind.names[0]
    form = _format_of(name, weight.dtype, scheme, model)
    if form is None:
        found = f"{name} of dtype {weight.dtype}"
        yield Fault("label", where, found, f"what the config says: {scheme.text}", AGAIN, count)
        return
    size = form.size(weight.dtype, weight.shape)
    for scale in form.scales:
        if isinstance(model.dialect, Quark) and scheme.format == "NVFP4":
            return  # its names for these scales are not known
        yield from _scale(scale, kind, scheme, size, model)


def _format_of(name: str, dtype: str, scheme: Scheme, model: Model) -> Format | None:
    """FP4 has other names in compressed-tensors than in ModelOpt, and scales that divide: engines know their own."""
    is_packed = name == "weight_packed"
    odd = (ModelOpt, ModelOptMixed) if is_packed else CompressedTensors
    if scheme.format in ("NVFP4", "MXFP4") and isinstance(model.dialect, odd):
        return None
    return next((form for form in FORMATS.get(scheme.format, ()) if dtype in form.weights.get(name, ())), None)


def _scale(scale: Scale, kind: Kind, scheme: Scheme, size: tuple[int, ...], model: Model) -> Iterator[Fault]:
    tensors, where, count = kind.form.tensors, kind.names[0], len(kind.names)
    name = next((each for each in scale.names if each in tensors), None)
    if name is None:
        if scale.needed(scheme):
            code: Code = "no-input-scale" if scale.role == "input" else "no-scale"
            found = "none" if scale.role == "input" else f"no {scale.names[0]}"
            yield Fault(code, where, found, f"{scale.names[0]} of {scheme.text}", AGAIN, count)
        return
    dtype, shape = tensors[name]
    weight = kind.first.weight
    fits = scale.fits(shape, size, scheme) or (scale.role == "weight" and _is_vector(shape, where, scheme, model))
    if dtype not in scale.dtypes or not fits:
        found = f"{weight.dtype} weight {list(weight.shape)} with {name} {dtype} {list(shape)}"
        expected = f"{scale.shape}, {scheme.text}, in {' or '.join(sorted(scale.dtypes))}"
        yield Fault("scale-shape", where, found, expected, AGAIN, count)


def _is_vector(shape: tuple[int, ...], module: str, scheme: Scheme, model: Model) -> bool:
    """A scale for each partition of a module that is stored fused: no dialect has a word for it but "tensor"."""
    modules = (each for group in model.groups.whole for each in group.modules if each.name == module)
    return scheme.layout == "tensor" and any(shape == (len(each.partitions),) for each in modules)


def _of_form(form: Form, names: Sequence[str], model: Model) -> Iterator[Fault]:
    """Scales without a weight, weights without any scale, and what is quantized and no matrix."""
    stored, shards = form.tensors, model.checkpoint.tensors
    if not any(weight in stored for weight in WEIGHTS):
        for kind in stored:
            if kind in SCALE_NAMES and kind != "scale":
                info = shards[f"{names[0]}.{kind}"]
                yield Fault("orphan-scale", f"{info.shard}: {info.name}", "", "its weight", AGAIN, len(names))
    for kind, (dtype, shape) in stored.items():
        if dtype in FP8_DTYPES and len(shape) > 2 and not _is_stacked(form, model):
            info = shards[f"{names[0]}.{kind}"]
            what = "experts in one tensor" if _EXPERTS.fullmatch(form.pattern) else "no engine reads it"
            found, expected = f"{list(shape)}, {what}", "FP8 weights of linear layers only"
            hint = "leave it out (*conv1d*), or store experts one by one, and quantize the model again"
            yield Fault("no-matrix", f"{info.shard}: {info.name}", found, expected, hint, len(names))


def _is_stacked(form: Form, model: Model) -> bool:
    family = str(text_config(model.checkpoint.config.value).get("model_type"))
    of_experts = _EXPERTS.fullmatch(form.pattern) is not None
    return of_experts and (family in _STACKED or model.model_type in _STACKED)
