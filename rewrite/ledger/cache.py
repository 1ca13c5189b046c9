"""The scales of an FP8 KV cache: one number each for k and v of every attention layer, or none anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rewrite.ledger.fault import Fault
from rewrite.ledger.names import is_mtp, is_vision
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.kv_cache import is_kv_cache_scale
from rewrite.quantization.model import Model

_DROP = "`rewrite convert IN OUT --kv-scales drop` leaves the cache unquantized"
_EVERY = "k_scale and v_scale of every attention layer"
#: ``kv_scale`` of old AutoFP8 is both (vLLM ``maybe_remap_kv_scale_name``).
_WHICH = re.compile(r"(?:.*\.)?(k|v|kv)(?:_proj\.output)?_scale")


def cache_faults(model: Model) -> Iterator[Fault]:
    checkpoint = model.checkpoint
    partners: dict[str, dict[str, str]] = {}
    for form, names in checkpoint.alike.items():
        for kind, (_, shape) in form.tensors.items():
            if not is_kv_cache_scale(f"{form.pattern}.{kind}"):
                continue
            if shape not in ((), (1,)) and not _is_by_head(model):
                found = f"{list(shape)}"
                yield Fault("kv-scale-shape", f"{names[0]}.{kind}", found, "() or [1]", _DROP, len(names))
            if kind == "output_scale" and isinstance(model.dialect, CompressedTensors):  # of 2024; vLLM 0.32.0 raises
                yield Fault("scale-name", f"{names[0]}.{kind}", kind, _EVERY, _DROP, len(names))
            which = _WHICH.fullmatch(f"{form.pattern}.{kind}")
            for name in names if which else ():
                partners.setdefault(_attention(name), {}).update(dict.fromkeys(which[1], f"{name}.{kind}"))  # type: ignore[index]
    for own in partners.values():
        if len(own) == 1:
            (one, name), *_ = own.items()
            other = "v" if one == "k" else "k"
            yield Fault("kv-scale-alone", name, f"{one} without {other}", "one for k and one for v", _DROP)
    lacking = [layer for layer in _attention_layers(model) if layer not in partners] if partners else []
    if lacking:
        yield Fault("kv-no-scale", lacking[0], f"{len(lacking)} of the layers", _EVERY, _DROP)
    if not partners and states_kv_cache(model):
        yield Fault("kv-no-scale", _where(model), "", _EVERY, _DROP)


def _attention_layers(model: Model) -> Iterator[str]:
    """Those with keys and values, of the language model."""
    text = text_config(model.checkpoint.config.value)
    for kind in model.kinds:
        pattern, _, part = kind.form.pattern.rpartition(".")
        if part in ("k_proj", "qkv_proj") and "attn" in pattern and not is_vision(pattern):
            yield from (_attention(name) for name in kind.names if not is_mtp(name, text))


def states_kv_cache(model: Model) -> bool:
    """Whether a config says that engines must quantize the KV cache by stored scales."""
    for dialect in filter(None, (model.dialect, model.second_dialect)):
        value = dialect.value
        if isinstance(dialect, Quark):
            if dialect.kv_cache_fp8:
                return True
            continue
        scheme = value.get("kv_cache_scheme")
        dynamic = isinstance(scheme, dict) and bool(scheme.get("dynamic"))
        if (scheme and not dynamic) or value.get("kv_cache_quant_algo") == "FP8":
            return True
    return False


def _is_by_head(model: Model) -> bool:
    """llm-compressor's ``strategy: attn_head``: a scale for each head, where the config says so."""
    scheme = model.dialect.value.get("kv_cache_scheme")
    return isinstance(scheme, dict) and scheme.get("strategy") == "attn_head"


def _where(model: Model) -> str:
    return "config.json: quantization_config" if model.dialect.value else "hf_quant_config.json"


def _attention(module: str) -> str:
    return re.sub(r"\.(?:(?:[kv]|qkv)_proj|attn)$", "", module)
