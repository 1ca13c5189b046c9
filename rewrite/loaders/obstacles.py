"""What a loader makes of a whole checkpoint, whatever its groups are. For which loader: versions.py."""

from __future__ import annotations

from collections.abc import Callable

from rewrite.loaders.blocks import BlockLayer, torn
from rewrite.loaders.outcome import SENTINEL, Outcome
from rewrite.loaders.views import CheckpointView

Obstacle = Callable[[CheckpointView], Outcome | None]

_HANDED_ON = ("kimi_k25", "kimi_k3", "glm5_next")  # SGLang 0.5.23, configs/
_NOT_SCALED = ("none", "block", "nvfp4", "other")  # layouts without a scale for a module, a partition or a row


def key_was_not_run(checkpoint: CheckpointView) -> Outcome | None:
    if checkpoint.not_run_with is None:
        return None
    return Outcome("not known", f"no engine was run with {checkpoint.not_run_with}")


def nested_config_is_not_read(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.9 to 0.5.23 look for it in the outermost part of config.json alone (``model_config.py``); 0.5.23 was
    run with FP8. The configs of three families hand it on."""
    if checkpoint.model_type in _HANDED_ON:
        return None
    return _not_read(checkpoint, "text_config.quantization_config")


def nested_config_was_not_run(checkpoint: CheckpointView) -> Outcome | None:
    found = nested_config_is_not_read(checkpoint)
    return found and Outcome("not known", found.detail.partition(":")[0])


def old_key_is_not_read(checkpoint: CheckpointView) -> Outcome | None:
    """transformers 5.17.0 and 5.24.0 have no such key; 5.24.0 was run with FP8."""
    return _not_read(checkpoint, "compression_config")


def _not_read(checkpoint: CheckpointView, place: str) -> Outcome | None:
    if checkpoint.places != (place,):
        return None
    said = f"does not read {place} of config.json"
    if checkpoint.fp8_with_scales and not checkpoint.nvfp4_layers:
        return Outcome("garbled", f"{said}: serves codes as weights", (), SENTINEL)
    return Outcome("not known", said)


def tower_was_not_run(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 was run with plain towers of Qwen3.5 and MiniCPM-V. With FP8 in one it was seen to serve codes
    (Qwen3.5, whose tower it builds plain), and to raise ("Downcasting not allowed", MiniCPM-V). The language model is
    as it would be; tests/zoo/engines.json looks at that alone."""
    if not checkpoint.tower_is_quantized:
        return None
    return Outcome("not known", "was seen to serve the codes of a quantized vision tower, and to refuse one")


def minicpmv_vision_is_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang before 0.5.23 calls MiniCPM-V's vision tower ``vpm`` and its merger ``resampler``: the names in ``ignore``
    miss them, their BF16 layers get FP8 parameters, and loading those raises ("Downcasting not allowed")."""
    if checkpoint.fp8_with_scales:
        return Outcome("fails to load", "takes the vision tower for quantized: it has other names there")
    return None


def cache_scales_of_qwen3_next(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 has no place for the scales of a KV cache in Qwen3-Next, and raises where one is not 1.0
    (``models/qwen3_next.py``, ``load_weights``: "Expected 1.0"). Other versions were not run."""
    if not checkpoint.kv_cache_scales:
        return None
    return Outcome("not known", "may refuse the scales of the KV cache of Qwen3-Next: --kv-scales drop leaves them out")


def mixed_without_nvfp4(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang from 0.5.15 takes MIXED_PRECISION without any NVFP4 layer for another format, ``w4afp8`` (read in 0.5.23,
    ``model_config.py``). Seen: raises, by the sizes of the layers."""
    if checkpoint.nvfp4_layers:
        return None
    return Outcome("not known", "takes MIXED_PRECISION without an NVFP4 layer for w4afp8")


def parts_follow_the_quantized_one(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 takes a fused layer of MIXED_PRECISION for quantized where any part of it is
    (``modelopt_quant.py``, ``_resolve_quant_algo``), and was seen to cast the plain parts to FP8. What comes of other
    mixes was not run."""
    for group in checkpoint.groups:
        layouts = {p.layout for p in group.parts}
        if "none" in layouts and len(layouts) > 1:
            return Outcome("not known", f"takes all of {group.name} for quantized, and some of it is not")
    return None


def ignore_must_survive_renaming(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.9 and 0.5.10 rename the entries of ``ignore``, but not the modules: exact names miss, the BF16
    ``in_proj_ba`` gets an FP8 parameter, and 0.5.9 refuses to load it ("Downcasting not allowed")."""
    if checkpoint.fp8_with_scales and not checkpoint.ignore_survives_renaming:
        return Outcome("fails to load", "takes in_proj_ba for quantized: exact names in ignore miss it")
    return None


def parts_are_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.10 misses the same names, but casts the BF16 ``in_proj_ba`` to FP8 without a word."""
    missed = ignore_must_survive_renaming(checkpoint)
    return missed and Outcome("garbled", "casts the BF16 in_proj_ba to FP8: exact names in ignore miss it")


def attention_is_cast(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.10 renames ``ignored_layers`` of ``fp8``, but not the modules: a BF16 ``qkv_proj`` of a
    vision-language model gets FP8 parameters whose scales are never set."""
    groups = [group for group in checkpoint.groups if group.kind == "qkv_proj" and "language_model." in group.name]
    plain = [p for group in groups for p in group.parts if p.layout == "none"]
    if not checkpoint.fp8_with_scales or not plain:
        return None
    names = tuple(dict.fromkeys(f"qkv_proj.{p.name}" for p in plain))
    return Outcome("garbled", "casts the BF16 qkv_proj to FP8: the names in ignored_layers miss it", names, SENTINEL)


def router_bias_is_not_stated(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM makes a place for the bias of DeepSeek-V3's router where the config has ``topk_method: noaux_tc`` only: 0.32
    raises a KeyError without it (``models/deepseek_v2.py``); other versions were not run. transformers from 5 does not
    write the key into new configs."""
    if not checkpoint.router_bias_is_not_stated:
        return None
    return Outcome("not known", "may have no place for e_score_correction_bias: config.json lacks topk_method")


def latent_scales_are_joined(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 joins the tensors of ``q_a_proj`` and ``kv_a_proj_with_mqa`` before it loads them
    (``deepseek_weight_loader.py``): two scales of ``[1]`` become one of ``[2]``, which has no place, as does a
    ``weight_shape``. Of two scales of ``()`` it takes the first: ``behaviors.py``."""
    if checkpoint.latent_vectors:
        return Outcome("fails to load", "joins the scales of q_a_proj and kv_a_proj_with_mqa (AssertionError)")
    return None


def rows_are_turned(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 puts the rows of Llama 4's q and k in another order for its rotary embedding (``mllama4.py``,
    ``permute_qk_weight_for_rotary``), and leaves their scales where they are."""
    for group in checkpoint.groups:
        layouts = {p.layout for p in group.parts} if group.kind == "qkv_proj" else set[str]()
        if "channel" in layouts:
            names = ("qkv_proj.q", "qkv_proj.k")
            return Outcome("garbled", "turns the rows of q and k, and not their scales", names, SENTINEL)
        if layouts & {"nvfp4", "group"}:
            return Outcome("not known", "turns the rows of q and k, which was not run with packed weights")
    return None


def shared_experts_have_no_weight(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 asks GLM-4.5's shared experts for the dtype of their ``weight`` (``glm4_moe.py``), which packed
    layers of compressed-tensors do not have."""
    shared = (group for group in checkpoint.groups if ".shared_experts." in group.name)
    if any(p.layout in ("nvfp4", "group") for group in shared for p in group.parts):
        return Outcome("fails to load", "packed shared experts have no weight (AttributeError)")
    return None


def listed_head_is_plain(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM 0.32.0 and SGLang 0.5.23: a packed ``lm_head`` where ``quantized_layers`` has it; no plain weight fits."""
    name = checkpoint.plain_with_scheme or ""
    if checkpoint.weight_only_nvfp4 and name.endswith("lm_head"):
        return Outcome("fails to load", f"takes {name} for packed, as quantized_layers has it (RuntimeError)")
    return None


def experts_have_another_name(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM 0.32.0 knows Gemma 4's experts as ``layers.0.experts`` only; SGLang 0.5.23 as ``moe.experts``, too."""
    if any(".moe.experts" in group.name for group in checkpoint.groups if group.experts):
        return Outcome("fails to load", "has no module named layers.0.moe (ValueError)")
    return None


def names_are_newer(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 knows Gemma 3's ``language_model.model`` only, not what transformers 5 calls it."""
    if any(group.name.startswith("model.language_model.") for group in checkpoint.groups):
        return Outcome("fails to load", "does not know the names model.language_model (KeyError)")
    return None


def stack_does_not_fit(checkpoint: CheckpointView) -> Outcome | None:
    """gpt-oss whose experts are not as wide as the config says: vLLM 0.32.0 lays their codes out in other rows
    (``gpt_oss.py``: a view by ``intermediate_size``), SGLang 0.5.23 never fills the rest."""
    if checkpoint.stack == "wider":
        return Outcome("not known", "was not run with experts that are wider than the config says")
    if checkpoint.stack == "fits":
        return None
    return Outcome("garbled", "lays experts out by the size that the config says, which is not theirs", (), SENTINEL)


def scales_are_left_out(checkpoint: CheckpointView) -> Outcome | None:
    """transformers knows no ``quant_method: modelopt``, and takes ``fp8`` for block-wise: of per-tensor checkpoints it
    loads FP8 values and leaves the scales out."""
    if not checkpoint.fp8_with_scales:
        return None
    quantized = [p for group in checkpoint.groups for p in group.parts if p.layout not in _NOT_SCALED]
    if not quantized:
        return Outcome("garbled", "leaves the scales of the other layers out")
    factor = 1 / min(p.scale or 1.0 for p in quantized)
    detail = f"leaves the scales out: weights up to {factor:.0f}x too large"
    return Outcome("garbled", detail, _quantized_names(checkpoint), factor)


def scales_are_rounded(checkpoint: CheckpointView) -> Outcome | None:
    """transformers with compressed-tensors creates scales in the model's dtype: F32 scales are rounded to it."""
    partitions = [p for group in checkpoint.groups for p in group.parts if p.layout not in _NOT_SCALED]
    if checkpoint.dtype in ("BF16", "F16") and any(p.scale_dtype == "F32" for p in partitions):
        names = _quantized_names(checkpoint)
        error = 2.0**-8 if checkpoint.dtype == "BF16" else 2.0**-11
        return Outcome("loses precision", f"rounds F32 scales to {checkpoint.dtype}: up to {error:.1%}", names, error)
    return None


def missing_scales_are_made_up(checkpoint: CheckpointView) -> Outcome | None:
    """transformers with compressed-tensors gives every linear layer that the config does not ignore a scale, and fills
    one that is not stored with whatever memory held: ``lm_head`` in AutoRound's FP8_STATIC, whose logits became NaN.
    Whether a matrix is a linear layer there cannot be seen in a checkpoint."""
    name = checkpoint.plain_with_scheme
    if name is None:
        return None
    return Outcome("not known", f"may take {name} for quantized: the config does not ignore it, but it has no scale")


def scalars_are_refused(checkpoint: CheckpointView) -> Outcome | None:
    """transformers from 5.23 on loads no scale of another shape than compressed-tensors makes, ``[1]`` or ``[N, 1]``
    (``core_model_loading.py``, ``set_param_for_module``: the shape was not checked of quantized models before)."""
    name = checkpoint.scalar_scale
    if name is None:
        return None
    return Outcome("fails to load", f"takes no scale of this shape: {name}")


def experts_lose_their_scale(checkpoint: CheckpointView) -> Outcome | None:
    """transformers 5.17 puts the experts of a layer into one BF16 tensor and leaves the global scales of NVFP4 out:
    weights are as many times too large as the stored divisors say."""
    if not checkpoint.nvfp4_experts:
        return None
    partitions = [p for group in checkpoint.groups if group.experts for p in group.parts if p.scale]
    names = tuple(dict.fromkeys(f"experts.{p.name}" for p in partitions))
    factor = max((1 / p.scale for p in partitions if p.scale), default=SENTINEL)
    return Outcome("garbled", "leaves the global scales of NVFP4 experts out", names, factor)


def blocks_are_torn(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM refuses fused layers whose partitions end inside a block of rows with one scale; not of the last one."""
    return _refuses(torn(checkpoint.block_layers, slots=False, every_part=False))


def blocks_are_torn_in_sglang(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang does so by the slots that it has, and with ``fp8`` for the last partition, too. Its
    ``fused_qkv_a_proj_with_mqa`` is a ``ReplicatedLinear`` with one slot, whose parts it does not check."""
    layers = [layer for layer in checkpoint.block_layers if not layer.name.endswith(".fused_qkv_a_proj")]
    return _refuses(torn(layers, slots=True, every_part=checkpoint.dialect == "fp8"))


def block_size_is_of_the_class(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang takes the block size for the scales of a fused layer from the target ``Linear`` of a compressed-tensors
    config, whatever target the layer has (``CompressedTensorsConfig.weight_block_size``, read in 0.5.9 to 0.5.23):
    where that one has no blocks, loading raises a TypeError. Experts have a loader of their own."""
    for layer in checkpoint.block_layers:
        if len(layer.slots) > 1 and not layer.experts and layer.class_block != layer.block:
            if layer.class_block is None:
                return Outcome("fails to load", f"finds no block size for {layer.name}: no target Linear states it")
            return Outcome("not known", f"cuts the scales of {layer.name} by the block size of the target Linear")
    return None


def block_scales_are_renamed(checkpoint: CheckpointView) -> Outcome | None:
    """SGLang 0.5.23 ``models/llama.py`` renames every ``weight_scale_inv`` to ``weight_scale``, for Mistral's scales of
    one value: block scales of a Llama find no place then, and nothing is said. Seen: none of them was ever set."""
    if not checkpoint.block_layers:
        return None
    detail = "renames weight_scale_inv to weight_scale: the block scales are never loaded"
    return Outcome("garbled", detail, _quantized_names(checkpoint), SENTINEL)


def _refuses(layer: BlockLayer | None) -> Outcome | None:
    if layer is None:
        return None
    return Outcome("fails to load", f"the rows of the parts of {layer.name} are not whole blocks of {layer.block[0]}")


def quark_was_not_run(checkpoint: CheckpointView) -> Outcome | None:
    """Engines were run with some of what AMD Quark writes: ``quark.py``."""
    reason = checkpoint.quark_not_run
    return None if reason is None else Outcome("not known", f"no loader was run with AMD Quark where {reason}")


def method_is_not_stated(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM takes a ``quantization_config`` without ``quant_method`` for none (0.19.1 and 0.32.0
    ``model_arch_config_convertor.py``): the scales find no place. Run with 0.32.0: ModelOpt 0.31 wrote such configs."""
    if checkpoint.method_is_stated:
        return None
    return Outcome("fails to load", "quantization_config has no quant_method: takes the checkpoint for plain")


def vocabulary_has_no_scale(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM builds embeddings plain, and ``lm_head``, too, where only the class ``Linear`` is a target: 0.19.1 and 0.32
    were run, and have no parameter for the scales ("no module or parameter named lm_head.input_scale")."""
    name = checkpoint.fp8_vocabulary
    return None if name is None else Outcome("fails to load", f"has no place for the scales of {name}")


def vocabulary_is_quantized(checkpoint: CheckpointView) -> Outcome | None:
    """vLLM 0.32 raises on the ``input_scale`` of an FP8 ``lm_head`` that no target names; other cases were not run."""
    if not checkpoint.vocabulary_is_quantized:
        return None
    return Outcome("not known", "lm_head or embed_tokens is quantized: loaders were not run with that")


def _quantized_names(checkpoint: CheckpointView) -> tuple[str, ...]:
    named = ((group.kind, p) for group in checkpoint.groups for p in group.parts)
    return tuple(dict.fromkeys(f"{layer}.{p.name}" for layer, p in named if p.layout != "none"))
