"""What is wrong in the config, whatever the layers are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewrite.ledger.fault import AGAIN, Fault
from rewrite.ledger.names import is_mtp, mtp_layers
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.fp8 import Fp8
from rewrite.quantization.dialects.modelopt import ModelOptNvfp4
from rewrite.quantization.model import Model

_GROUPED = ("group", "tensor_group")
_ANY = "`rewrite convert IN OUT` states it as compressed, with any profile"


def config_faults(model: Model) -> Iterator[Fault]:
    if isinstance(model.dialect, CompressedTensors):
        status = model.dialect.value.get("quantization_status")
        packed = any(not kind.first.plain for kind in model.kinds)
        if packed and status not in ("compressed", None):
            where = "config.json: quantization_config.quantization_status"
            yield Fault("status", where, str(status)[:80], "compressed", _ANY)
        for name, group in model.dialect.value["config_groups"].items():
            for key in ("weights", "input_activations"):
                if found := contradiction(group.get(key) or {}):
                    where = f"config.json: quantization_config.config_groups.{name}.{key}"
                    yield Fault("arguments", where, found, "what the weights were quantized with", AGAIN)
    if isinstance(model.dialect, ModelOptNvfp4) and (size := _group_size(model.dialect.value)) not in (None, 16):
        where = "config.json: quantization_config.config_groups"
        yield Fault("label", where, f"group_size {size}", "16, as NVFP4 has it", "state it as the model was quantized")
    if isinstance(model.dialect, Fp8) and "activation_scheme" not in model.dialect.value:
        where = "config.json: quantization_config.activation_scheme"
        yield Fault("no-activations", where, "no such key", "static or dynamic", "state it as the model was quantized")
    yield from _mtp(model)


def _group_size(stated: Mapping[str, Any]) -> Any:
    """Of the first group of a ModelOpt config."""
    groups = stated.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, Mapping) else stated
    weights = first.get("weights", first) if isinstance(first, Mapping) else None
    return weights.get("group_size") if isinstance(weights, Mapping) else None


def contradiction(stated: Mapping[str, Any]) -> str | None:
    """compressed-tensors 0.20 ``QuantizationArgs.validate_model_after``, which every engine reads configs with."""
    strategy, size, dynamic = stated.get("strategy"), stated.get("group_size"), stated.get("dynamic")
    has_size, has_blocks = isinstance(size, int) and size > 0, stated.get("block_structure") is not None
    if strategy is None:
        strategy = "tensor" if size is None else "group" if has_size else "channel"
    rules = {
        f"group_size {size}": size == 0 and stated.get("strategy") is None,
        f"group_size {size} beside strategy {strategy}": has_size and strategy not in _GROUPED,
        f"strategy {strategy} without a group_size": strategy in _GROUPED and not has_size,
        f"strategy {strategy} with{'' if has_blocks else 'out'} a block_structure": has_blocks != (strategy == "block"),
        "strategy token that is not dynamic": strategy == "token" and not dynamic,
        f"dynamic beside strategy {strategy}": bool(dynamic) and strategy in ("channel", "block"),
        f"dynamic local beside strategy {strategy}": dynamic == "local" and strategy != "tensor_group",
    }
    return next((text for text, broken in rules.items() if broken), None)


def _mtp(model: Model) -> Iterator[Fault]:
    text = text_config(model.checkpoint.config.value)
    promised = mtp_layers(text)
    kinds = (kind for kind in model.kinds if ".experts." not in kind.form.pattern)
    if promised and not any(is_mtp(name, text) for kind in kinds for name in kind.names):
        yield Fault(
            "mtp-missing",
            "config.json",
            f"{promised} promised",
            "mtp layers among the tensors",
            "speculative decoding with MTP does not work; all else does",
        )
