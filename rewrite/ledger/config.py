"""What is wrong in the config, whatever the layers are."""

from __future__ import annotations

from collections.abc import Iterator

from rewrite.ledger.fault import Fault
from rewrite.ledger.names import is_mtp, mtp_layers
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.model import Model

_ANY = "`rewrite convert IN OUT` states it as compressed, with any profile"


def config_faults(model: Model) -> Iterator[Fault]:
    if isinstance(model.dialect, CompressedTensors):
        status = model.dialect.value.get("quantization_status")
        packed = any(not kind.first.plain for kind in model.kinds)
        if packed and status not in ("compressed", None):
            where = "config.json: quantization_config.quantization_status"
            yield Fault("status", where, str(status)[:80], "compressed", _ANY)
    yield from _mtp(model)


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
