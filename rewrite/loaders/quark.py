"""Which of AMD Quark's checkpoints engines were run with.

vLLM 0.19.1 and 0.32.0 and SGLang 0.5.23 were run with what Quark 0.13 exports (``tests/zoo``): FP8 with one scale for a
layer and static activations, or with one for each row and each token. They serve these as they serve the same in other
dialects. transformers needs Quark's own package.
"""

from __future__ import annotations

from rewrite.ledger.ledger import header_faults
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.model import Kind, Model

#: Layout, activations, and whether the activations have a scale for each token.
_RUN = (("tensor", "static", False), ("rows", "dynamic", True))


def what_was_not_run(model: Model) -> str | None:
    """What of a Quark checkpoint no loader was run with; None where they were, or where the dialect is another one."""
    if not isinstance(model.dialect, Quark):
        return None
    if unsupported := model.dialect.unsupported:
        return unsupported
    for fault in header_faults(model):
        if fault.code in ("no-matrix", "no-input-scale"):
            return f"{fault.where} has {fault.what}"
    if expert := next((name for name in model.checkpoint.tensors if ".experts." in name), None):
        return f"{expert} is an expert"
    for kind in model.kinds:
        if reason := _not_run(kind):
            return reason
    return None


def _not_run(kind: Kind) -> str | None:
    name, module, scheme = kind.names[0], kind.first, kind.first.scheme
    if module.plain:
        return None
    if scheme is None or not scheme.fp8:
        return f"{name} is {scheme.format if scheme else module.weight.dtype}"
    if (scheme.layout, scheme.activations, scheme.per_token) not in _RUN:
        return f"{name} has {scheme.text}"
    return None
