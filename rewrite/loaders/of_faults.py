"""What engines make of what is wrong in a checkpoint. Which engine, and since when: versions.py.

A fault of which nothing is known makes an outcome "not known", whatever the groups are; those of :data:`HARMLESS` do
not touch the weights that are served.
"""

from __future__ import annotations

from collections.abc import Callable

from rewrite.ledger.fault import Code, Fault
from rewrite.ledger.names import is_vision
from rewrite.loaders.outcome import SENTINEL, Outcome

#: What comes of a fault; None: what is known is about other cases of it.
OfFault = Callable[[Fault], Outcome | None]

#: MTP layers are loaded for speculative decoding only; engines take 1.0 where a cache has no scale; groups and
#: families are judged elsewhere; all engines but transformers pass the status over.
HARMLESS: frozenset[Code] = frozenset(
    (
        *("mtp-format", "mtp-label", "mtp-missing", "kv-no-scale", "status", "block-sample"),
        *("group-in-part", "architecture", "no-config", "weights"),
    )
)


def not_known(fault: Fault) -> Outcome | None:
    return None if fault.code in HARMLESS else Outcome("not known", fault.what)


def is_beside(fault: Fault) -> bool:
    """Of a tower beside the language model, which alone was run."""
    return is_vision(fault.tensor)


def plain_weights_are_cast(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run, with the code ignore-pattern SGLang 0.5.23, too: it casts BF16 weights to FP8 without a
    word, and takes scales that nothing has set."""
    if "float8" not in fault.expected and "FP8" not in fault.expected:
        return None
    return Outcome("garbled", f"casts the plain weights of {fault.where} to FP8", (), SENTINEL)


def router_has_no_scale(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: ValueError, no parameter ``mlp.gate.input_scale``."""
    return Outcome("fails to load", f"has no place for the scales of {fault.where}")


def nan_is_refused(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: RuntimeError, "weight_scale ... still NaN", of block scales of NVFP4. It loads a vision
    tower with such scales."""
    if not fault.found.startswith("NaN") or is_vision(fault.tensor):
        return None
    return Outcome("fails to load", f"refuses NaN among the block scales of {fault.tensor}")


def unset_scale_is_taken(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: it loads NVFP4 layers and experts without ``weight_scale_2`` or ``input_scale``. Without
    block scales it was seen to end with "still NaN", in ModelOpt's dialect."""
    if "NVFP4" not in fault.expected or fault.found == "no weight_scale":
        return None
    return Outcome("garbled", f"takes a scale of {fault.where} from memory that nothing has filled", (), SENTINEL)


def fp8_is_no_nvfp4(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: AssertionError in ``load_merged_column_weight``."""
    if "NVFP4" not in fault.expected or "F8" not in fault.found:
        return None
    return Outcome("fails to load", f"takes the FP8 weights of {fault.where} for packed ones (AssertionError)")


def stacked_experts_are_refused(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: IndexError in ``routed_experts.py``."""
    return Outcome("fails to load", f"cannot split {fault.tensor}") if "experts" in fault.found else None


def no_such_scheme(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run with FP8 of ``symmetric: false``: "No compressed-tensors compatible scheme
    was found"."""
    return Outcome("fails to load", "has no scheme for asymmetric floats") if "asymmetric" in fault.expected else None


def no_place_beside_fp8(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run with these; SGLang 0.5.23 leaves them out, with a wrong result where they mean something."""
    ran = ("pre_quant_scale", "weight_zero_point", "weight_g_idx")
    is_fp8 = fault.found in ran and "FP8" in fault.expected
    return Outcome("fails to load", f"has no place for {fault.where}") if is_fp8 else None


def no_such_layer(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run with a Llama: ValueError, no module ``layers.1``, or ``base_model``. SGLang 0.5.23 leaves
    such tensors out."""
    return Outcome("fails to load", f"has no place for {fault.where}")


def sizes_are_checked(fault: Fault) -> Outcome | None:
    """SGLang 0.5.23 and vLLM 0.32.0 were run with one expert more, and 64 words less, than the config says: an
    AssertionError of the router's or the embeddings' shape."""
    return no_such_layer(fault) if ".experts." in fault.where or fault.found.endswith("rows") else None


def nothing_is_loaded(_fault: Fault) -> Outcome | None:
    """SGLang 0.5.23 was run with a Llama: it leaves all tensors out, and raises nothing."""
    return Outcome("garbled", "loads no tensor of such a name", (), SENTINEL)


def no_such_parameter(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run with ``weight_scale_inv`` and ``activation_scale`` of llama and Qwen3.5, and with an
    ``input_scale`` beside dynamic activations: it has no parameter of that name, and raises. Not of blocks."""
    if "per block" in fault.expected:
        return None
    return Outcome("fails to load", f"has no place for {fault.tensor}")


def key_is_needed(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run: ValueError, "Cannot find any of ['activation_scheme']"."""
    return Outcome("fails to load", f"needs {fault.where.rpartition('.')[2]} in config.json")


def config_is_not_read(fault: Fault) -> Outcome | None:
    """vLLM 0.19.1 and 0.32.0, SGLang 0.5.23 and transformers 5.24.0 were run: compressed-tensors' ValidationError."""
    return Outcome("fails to load", f"does not read config.json: {fault.found}")


def nothing_fills_it(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 and SGLang 0.5.23 were run without a layer, a norm, the last one, a linear layer, the embeddings and
    the head of llama, and without ``A_log`` and ``dt_bias`` of Qwen3.5: they load the rest, and say nothing. They were
    not run without the bias of a linear layer."""
    if fault.tensor.endswith(".bias"):
        return None
    return Outcome("garbled", f"never fills {fault.tensor}", (), SENTINEL)


def v_needs_k(fault: Fault) -> Outcome | None:
    """vLLM 0.32.0 was run: ``assert layer.k_scale > 0.0``."""
    return (
        Outcome("fails to load", "finds a v_scale and no k_scale (AssertionError)")
        if fault.found.startswith("v ")
        else None
    )


def codes_are_served(fault: Fault) -> Outcome | None:
    """transformers 5.17.0 was run (its issue #47145): it serves codes as weights where the status is ``frozen``."""
    if fault.found != "frozen":
        return Outcome("not known", fault.what)
    return Outcome("garbled", "serves codes as weights: quantization_status is frozen", (), SENTINEL)
