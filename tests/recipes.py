"""Random checkpoints that nobody chose: a seed becomes a recipe, a recipe a checkpoint of real weights.

A recipe is what a user of llm-compressor writes: config groups with targets by class, pattern or name, an ``ignore``
list, a KV-cache scheme, a number of shards. compressed-tensors' own matcher says which module gets which scheme, and
its own compressors pack what is not a plain cast. Or it is what a user of ModelOpt or of vLLM's ``fp8`` gets: one
scheme for all that is not left out, by names or globs; or, in mixed precision, one for each module. Or of AMD Quark:
one scheme, and perhaps another for a glob. The weights are those of a fixture, dequantized.
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match, match_targets
from safetensors.torch import load_file, save_file

from tests.support import FIXTURES

FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]
#: Fixtures to take weights from, and how often each is chosen.
BASES = {
    "llmcompressor-qwen3_5-text": 2,
    "llmcompressor-qwen3_5-vl": 1,
    "llmcompressor-qwen3_5-moe": 1,
    "llmcompressor-llama": 2,
    "llmcompressor-phi3": 1,
    "llmcompressor-qwen3_next": 1,
    "modelopt-qwen3_5-vl": 5,  # smaller than llm-compressor's, and known to every engine
    "modelopt-qwen3_5-moe": 2,
}
#: Dialects, and how often each is chosen. Quantized by ModelOpt and ``fp8`` are all linears but those left out.
DIALECTS = {"compressed-tensors": 8, "modelopt": 2, "fp8": 2, "modelopt MIXED_PRECISION": 1, "quark": 2}
#: Patterns as recipes have them.
PATTERNS = (
    *("re:.*self_attn.*", "re:.*mlp.*", "re:.*linear_attn.*", "re:.*(gate|up)_proj$", "re:.*down_proj$"),
    *(r"re:.*\.(q|k|v|o)_proj$", "re:.*in_proj_(qkv|z)$", "re:.*in_proj_qkv$", "re:.*_proj.*", "re:.*proj_z"),
    *(r"re:.*layers\.[01]\..*", r"re:model.*layers\.2\..*", "re:.*experts.*", "re:.*out_proj", r"re:.*in_proj_[ab]$"),
    *("re:.*q_proj|.*k_proj|.*v_proj", r"re:^model\..*linear_attn\.in_proj.*", r"re:.*lm_head"),
)
QUARK_GLOBS = ("*self_attn*", "*mlp*", "*linear_attn*", "*down_proj", "*out_proj", "*layers.0.*")
IGNORED = ("re:.*lm_head", "re:.*self_attn.*", r"re:.*layers\.0\..*", "re:.*in_proj_z$", "re:.*shared_expert.*")


def _args(**given: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False, **given}


@dataclass(frozen=True)
class Kind:
    """A scheme: its ``QuantizationArgs``, the format, and how a weight [N, K] becomes tensors."""

    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None
    format: str
    store: Callable[[torch.Tensor, QuantizationArgs, torch.Generator], Tensors]
    multiple: int = 1  # of rows and columns


def _cast(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = FP8) -> torch.Tensor:
    largest = torch.finfo(dtype).max if dtype == FP8 else 127.0
    values = (weight / scale).clamp(-largest, largest)
    return values.to(dtype) if dtype == FP8 else values.round().to(dtype)


def _per_tensor(weight: torch.Tensor, _: QuantizationArgs, __: torch.Generator) -> Tensors:
    scale = (weight.abs().amax() / 448).clamp(min=1e-6).bfloat16().reshape(1)
    return {"weight": _cast(weight, scale.float()), "weight_scale": scale}


def _per_channel(weight: torch.Tensor, args: QuantizationArgs, _: torch.Generator) -> Tensors:
    largest, dtype = (448, FP8) if args.type == "float" else (127, torch.int8)
    scale = (weight.abs().amax(1, keepdim=True) / largest).clamp(min=1e-6).bfloat16()
    return {"weight": _cast(weight, scale.float(), dtype), "weight_scale": scale}


def _per_block(weight: torch.Tensor, _: QuantizationArgs, __: torch.Generator) -> Tensors:
    """Blocks of 128 x 128; the last ones of rows and columns may be smaller."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % 128, 0, -rows % 128))
    blocks = padded.reshape(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-6).bfloat16()
    each = scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    return {"weight": _cast(weight, each), "weight_scale": scale}


def _int4(weight: torch.Tensor, args: QuantizationArgs, _: torch.Generator) -> Tensors:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    size = args.group_size or 32
    groups = weight.reshape(len(weight), -1, size)
    scale = (groups.abs().amax(2) / 7).clamp(min=1e-6).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int8).reshape(weight.shape)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": pack_to_int32(codes, 4), "weight_scale": scale, "weight_shape": shape}


def _nvfp4(weight: torch.Tensor, args: QuantizationArgs, _: torch.Generator) -> Tensors:
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    divisor = (6 * 448 / weight.abs().amax()).reshape(1).float()
    blocks = weight.reshape(len(weight), -1, 16)
    scale = (blocks.abs().amax(2) / 6 * divisor).clamp(max=448).to(FP8)
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    unit = (scale.float() / divisor).clamp(min=1e-12)[..., None]
    codes = (blocks.abs() / unit)[..., None].sub(grid).abs().argmin(-1)
    values = (grid[codes] * blocks.sign()).reshape(weight.shape)
    return {"weight_packed": pack_fp4_to_uint8(values), "weight_scale": scale, "weight_global_scale": divisor}


_TOKEN = _args(strategy="token", dynamic=True)
_BLOCK_INPUTS = _args(strategy="group", group_size=128, dynamic=True)
_FP4 = _args(num_bits=4, strategy="tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
KINDS: dict[str, Kind] = {
    "fp8-tensor-static": Kind(_args(), _args(), "float-quantized", _per_tensor),
    "fp8-tensor-dynamic": Kind(_args(), _args(dynamic=True), "float-quantized", _per_tensor),
    "fp8-tensor-token": Kind(_args(), _TOKEN, "float-quantized", _per_tensor),
    "fp8-weight-only": Kind(_args(), None, "float-quantized", _per_tensor),
    "fp8-channel-token": Kind(_args(strategy="channel"), _TOKEN, "float-quantized", _per_channel),
    "fp8-channel-static": Kind(_args(strategy="channel"), _args(), "float-quantized", _per_channel),
    "fp8-block": Kind(
        _args(strategy="block", block_structure=[128, 128]), _BLOCK_INPUTS, "float-quantized", _per_block
    ),
    "int8": Kind(_args(type="int", strategy="channel"), {**_TOKEN, "type": "int"}, "int-quantized", _per_channel),
    "int4": Kind(_args(type="int", num_bits=4, strategy="group", group_size=32), None, "pack-quantized", _int4, 32),
    "nvfp4": Kind(_FP4, {**_FP4, "dynamic": "local"}, "nvfp4-pack-quantized", _nvfp4, 16),
    "nvfp4a16": Kind(_FP4, None, "nvfp4-pack-quantized", _nvfp4, 16),
}
WEIGHTS = {"fp8-tensor-static": 8, "fp8-tensor-dynamic": 2}  # how often a kind is chosen; 1 for the others


@dataclass(frozen=True)
class Recipe:
    """What a user asks a producer for. ``groups``: (kind, targets), in order."""

    seed: int
    base: str
    groups: tuple[tuple[str, tuple[str, ...]], ...]
    ignore: tuple[str, ...]
    kv_cache: bool
    shards: int
    alike_inputs: bool = False  # one input scale for all modules; else each has its own
    dialect: str = "compressed-tensors"
    fault: str = ""  # of FAULTS


def draw(seed: int, kinds: tuple[str, ...] = tuple(KINDS), bases: Mapping[str, int] = BASES) -> Recipe:
    """The recipe of a seed. ``bases``: fixtures or absolute paths of checkpoints, and how often each is chosen."""
    chance = random.Random(seed)
    base = chance.choices(list(bases), list(bases.values()))[0]
    dialect = chance.choices(list(DIALECTS), list(DIALECTS.values()))[0]
    linears = sorted(_linears(base))
    ignore = [name for name in ("lm_head",) if chance.random() < 0.8]
    ignore += _left_alone(chance, linears)
    if dialect == "compressed-tensors":
        groups = _groups(chance, linears, kinds)
        ignore += [pattern for pattern in IGNORED if chance.random() < 0.08]
    else:
        groups = _groups_of_others(chance, dialect, linears)
        ignore += chance.sample(linears, chance.choice((0, 0, 1, 2)))
    chance.shuffle(ignore)
    kv_cache = chance.random() < 0.2 and dialect == "compressed-tensors"
    shards, alike = chance.choice((1, 1, 2, 5)), chance.random() < 0.3
    return Recipe(seed, base, tuple(groups), tuple(dict.fromkeys(ignore)), kv_cache, shards, alike, dialect)


def with_fault(recipe: Recipe) -> Recipe:
    """The same, with something wrong in it."""
    return replace(recipe, fault=random.Random(recipe.seed).choice(list(FAULTS)))


def _groups(chance: random.Random, linears: list[str], kinds: tuple[str, ...]) -> list[tuple[str, tuple[str, ...]]]:
    count = chance.choice((1, 1, 2, 2, 3))
    weights = [WEIGHTS.get(kind, 1) for kind in kinds]
    groups: list[tuple[str, tuple[str, ...]]] = []
    for _ in range(count):
        kind = chance.choices(kinds, weights)[0]
        targets = _targets(chance, linears, alone=count == 1)
        taken = {target for _, own in groups for target in own}
        if left := tuple(target for target in targets if target not in taken):
            groups.append((kind, left))
    return groups


def _groups_of_others(chance: random.Random, dialect: str, linears: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """ModelOpt and ``fp8`` have one scheme; in mixed precision each class of modules has one."""
    if dialect == "modelopt":
        return [("fp8-tensor-static", ("Linear",))]
    if dialect == "fp8":
        likely = ("fp8-tensor-static", "fp8-tensor-static", "fp8-tensor-dynamic", "fp8-block", "fp8-block")
        return [(chance.choice(likely), ("Linear",))]
    if dialect == "quark":  # one scheme for all, and for some globs perhaps another
        own = ("fp8-tensor-static", "fp8-tensor-static", "fp8-channel-token", "fp8-tensor-dynamic")
        other = (chance.choice(own), (chance.choice(QUARK_GLOBS),))
        return [(chance.choice(own), ("Linear",)), *([other] if chance.random() < 0.3 else [])]
    named = [name for name in linears if "visual" not in name and "lm_head" not in name and "experts" not in name]
    lasts = sorted({name.rpartition(".")[2] for name in named})
    given = {last: chance.choices(("fp8-tensor-static", "nvfp4", None), (6, 3, 1))[0] for last in lasts}
    for together in (("in_proj_qkv", "in_proj_z"), ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        if chance.random() < 0.85:  # ModelOpt gives the parts of a fused layer one format
            given |= {last: given[together[0]] for last in together if last in given and together[0] in given}
    kinds = dict.fromkeys(kind for kind in given.values() if kind is not None)
    return [
        (kind, tuple(sorted(name for name in named if given[name.rpartition(".")[2]] == kind))) for kind in kinds
    ] or [("fp8-tensor-static", tuple(named))]


def _targets(chance: random.Random, linears: list[str], *, alone: bool) -> tuple[str, ...]:
    form = chance.random()
    if form < (0.6 if alone else 0.3):
        return ("Linear",)
    if form < 0.85:
        return tuple(chance.sample(PATTERNS, chance.choice((1, 2, 3))))
    last = chance.choice(["in_proj_qkv", "in_proj_z", "q_proj", "down_proj", "out_proj"])
    named = tuple(name for name in linears if name.endswith(last))
    return named or ("Linear",)


def _left_alone(chance: random.Random, linears: list[str]) -> list[str]:
    """What recipes leave alone nearly always, by name or by pattern."""
    parts = {"visual": 1.0, "in_proj_a": 0.85, "in_proj_b": 0.85, "mlp.gate": 1.0, "shared_expert_gate": 1.0}
    found: list[str] = []
    by_name = chance.random() < 0.5
    for part, probability in parts.items():
        names = [n for n in linears if n.endswith(part) or (part == "visual" and ".visual." in n)]
        if names and (chance.random() < probability):
            found += names if by_name else [f"re:.*{part}.*" if part == "visual" else f"re:.*{part}$"]
    return found


def is_linear(name: str, tensor: torch.Tensor) -> bool:
    """Whether a stored tensor is the weight of a ``torch.nn.Linear``."""
    return name.endswith(".weight") and tensor.ndim == 2 and tensor.numel() > 0 and "embed" not in name


@cache
def base_weights(base: str) -> tuple[dict[str, Any], Tensors]:
    """Config and plain tensors of a fixture: FP8 weights times their scales, no scales."""
    folder = FIXTURES / base
    stored: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        stored |= load_file(shard)
    plain: Tensors = {}
    for name, tensor in stored.items():
        if tensor.dtype == FP8:
            scale = stored[f"{name}_scale"].float()
            plain[name] = (tensor.float() * scale).bfloat16()
        elif not name.endswith(("weight_scale", "input_scale", "k_scale", "v_scale")):
            plain[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    return config, plain


def _linears(base: str) -> list[str]:
    return [name.removesuffix(".weight") for name, tensor in base_weights(base)[1].items() if is_linear(name, tensor)]


def assign(recipe: Recipe) -> dict[str, str]:
    """The kind of each quantized linear, by compressed-tensors' own matcher; of Quark by globs, which count first."""
    if recipe.dialect == "quark":
        return {name: kind for name in _linears(recipe.base) if (kind := _kind_in_quark(name, recipe))}
    linear = torch.nn.Linear(1, 1, device="meta")
    targets = {target: kind for kind, own in reversed(recipe.groups) for target in own}
    found = {}
    for name in _linears(recipe.base):
        if is_match(name, linear, targets, recipe.ignore):
            found[name] = targets[match_targets(name, linear, targets)[0]]
    return found


def _kind_in_quark(name: str, recipe: Recipe) -> str | None:
    left = (fnmatchcase(name, _glob(entry)) for entry in recipe.ignore)
    if any(left):
        return None
    given = (kind for kind, globs in recipe.groups[1:] if any(fnmatchcase(name, glob) for glob in globs))
    return next(given, recipe.groups[0][0])


def _glob(entry: str) -> str:
    """An entry of ``ignore`` as recipes have them, which Quark has as a glob."""
    return entry.removeprefix("re:").replace(".*", "*").removesuffix("$").replace("\\", "")


def make(recipe: Recipe, folder: Path) -> dict[str, str]:
    """Write the checkpoint of a recipe; the kind of each quantized module.

    A module that a kind does not fit (rows or columns that no group divides) is left alone by name, as a user would.
    """
    config, plain = base_weights(recipe.base)
    kinds = assign(recipe)
    misfits = [n for n, kind in kinds.items() if any(s % KINDS[kind].multiple for s in plain[f"{n}.weight"].shape)]
    recipe = replace(recipe, ignore=(*recipe.ignore, *misfits))
    kinds = {name: kind for name, kind in kinds.items() if name not in misfits}
    generator = torch.Generator().manual_seed(recipe.seed)
    store = _STORES.get(recipe.dialect, _store_as_modelopt)
    tensors: Tensors = {}
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        if module in kinds and name != module:
            chance = torch.Generator().manual_seed(recipe.seed) if recipe.alike_inputs else generator
            tensors |= store(module, tensor, KINDS[kinds[module]], chance)
        else:
            tensors[name] = tensor
    if recipe.kv_cache:
        layers = sorted(
            {name.rpartition(".")[0] for name in _linears(recipe.base) if name.endswith("self_attn.k_proj")}
        )
        for layer in layers:
            for which in "kv":
                tensors[f"{layer}.{which}_scale"] = (torch.rand(1, generator=generator) + 0.01).bfloat16()
    quantization = _CONFIGS[recipe.dialect](recipe, kinds)
    if recipe.fault:
        FAULTS[recipe.fault](tensors, quantization, random.Random(recipe.seed))
    folder.mkdir(parents=True)
    if recipe.dialect.startswith("modelopt"):
        (folder / "hf_quant_config.json").write_text(json.dumps(_hf_quant_config(quantization), indent=2))
    for extra in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        if (FIXTURES / recipe.base / extra).exists():
            shutil.copy(FIXTURES / recipe.base / extra, folder / extra)
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    _save(tensors, folder, recipe)
    return kinds


def _store(module: str, weight: torch.Tensor, kind: Kind, generator: torch.Generator) -> Tensors:
    arguments = QuantizationArgs(**kind.weights)
    stored = {f"{module}.{name}": tensor for name, tensor in kind.store(weight.float(), arguments, generator).items()}
    if kind.inputs is not None and kind.inputs["dynamic"] is not True:
        scale = (torch.rand(1, generator=generator) * 0.05 + 0.01).bfloat16()
        if kind.inputs["strategy"] == "tensor_group":
            stored[f"{module}.input_global_scale"] = scale.float().reciprocal()
        else:
            stored[f"{module}.input_scale"] = scale
    return stored


def _store_as_modelopt(module: str, weight: torch.Tensor, kind: Kind, generator: torch.Generator) -> Tensors:
    """Scales F32 ``()``; of NVFP4 the packed weight's own name, and global scales by which values are multiplied."""
    stored = _store(module, weight, kind, generator)
    tensors: Tensors = {}
    for name, tensor in stored.items():
        own, _, last = name.rpartition(".")
        if last == "weight_packed":
            tensors[f"{own}.weight"] = tensor
        elif last == "weight_scale" and kind is KINDS["fp8-block"]:
            tensors[f"{name}_inv"] = tensor.float()
        elif last in _GLOBAL:
            tensors[f"{own}.{_GLOBAL[last]}"] = tensor.float().reciprocal().reshape(())
        elif tensor.numel() == 1:
            tensors[name] = tensor.float().reshape(())
        else:
            tensors[name] = tensor
    return tensors


def _store_as_quark(module: str, weight: torch.Tensor, kind: Kind, generator: torch.Generator) -> Tensors:
    """Scales of one value are ``()``, those of rows ``[N]``."""
    stored = _store(module, weight, kind, generator)
    return {
        name: tensor.reshape(-1 if tensor.numel() > 1 else ()) if name.endswith("_scale") else tensor
        for name, tensor in stored.items()
    }


_STORES = {"compressed-tensors": _store, "quark": _store_as_quark}


def _ignored_linears(recipe: Recipe, kinds: Mapping[str, str]) -> list[str]:
    """Every linear that is left alone, by name."""
    return sorted(name for name in _linears(recipe.base) if name not in kinds)


def _modelopt_config(recipe: Recipe, kinds: Mapping[str, str]) -> dict[str, Any]:
    """As ModelOpt writes it: names, and globs for whole subtrees where all in them are left alone."""
    ignored = _ignored_linears(recipe, kinds)
    if any("visual" in name for name in ignored) and not any("visual" in name for name in kinds):
        ignored = [*(name for name in ignored if "visual" not in name), "model.visual*"]
    groups = {"group_0": {"input_activations": _MODELOPT_FP8, "weights": _MODELOPT_FP8, "targets": ["Linear"]}}
    return {
        "config_groups": groups,
        "ignore": ignored,
        "quant_algo": "FP8",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def _mixed_config(recipe: Recipe, kinds: Mapping[str, str]) -> dict[str, Any]:
    fp4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    algorithms = {"nvfp4": {"quant_algo": "NVFP4", "group_size": 16}, "fp8-tensor-static": {"quant_algo": "FP8"}}
    groups = {
        f"group_{number}": {
            "input_activations": form,
            "weights": form,
            "targets": sorted(name for name, own in kinds.items() if own == kind),
        }
        for number, (kind, form) in enumerate((("fp8-tensor-static", _MODELOPT_FP8), ("nvfp4", fp4)))
    }
    return {
        "config_groups": {name: group for name, group in groups.items() if group["targets"]},
        "quantized_layers": {name: algorithms[kind] for name, kind in kinds.items()},
        "ignore": _ignored_linears(recipe, kinds),
        "quant_algo": "MIXED_PRECISION",
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quant_method": "modelopt",
    }


def _hf_quant_config(config: Mapping[str, Any]) -> dict[str, Any]:
    quantization = {"quant_algo": config["quant_algo"], "kv_cache_quant_algo": None}
    if "quantized_layers" in config:
        quantization["quantized_layers"] = config["quantized_layers"]
    else:
        quantization["exclude_modules"] = config["ignore"]
    return {"producer": config["producer"], "quantization": quantization}


def _fp8_config(recipe: Recipe, kinds: Mapping[str, str]) -> dict[str, Any]:
    (kind, _), *_ = recipe.groups
    scheme = "static" if kind == "fp8-tensor-static" else "dynamic"
    blocks = {"weight_block_size": [128, 128]} if kind == "fp8-block" else {}
    left = _ignored_linears(recipe, kinds)
    return {"quant_method": "fp8", "activation_scheme": scheme, **blocks, "ignored_layers": left}


def _quark_config(recipe: Recipe, kinds: Mapping[str, str]) -> dict[str, Any]:
    """As Quark 0.13 exports it: every name that is left alone in ``exclude``."""

    def spec(given: Mapping[str, Any]) -> dict[str, Any]:
        by_row = given["strategy"] in ("channel", "token")
        axis = {"channel": 0, "token": 1}.get(given["strategy"])
        qscheme = "per_channel" if by_row else "per_tensor"
        dynamic = bool(given["dynamic"])
        return {"dtype": "fp8_e4m3", "is_dynamic": dynamic, "qscheme": qscheme, "ch_axis": axis, "symmetric": True}

    def layer(name: str) -> dict[str, Any]:
        kind = KINDS[name]
        inputs = None if kind.inputs is None else spec(kind.inputs)
        return {"weight": spec(kind.weights), "input_tensors": inputs, "output_tensors": None, "bias": None}

    (kind, _), *others = recipe.groups
    return {
        "quant_method": "quark",
        "global_quant_config": layer(kind),
        "layer_quant_config": {glob: layer(own) for own, globs in others for glob in globs},
        "layer_type_quant_config": {},
        "exclude": _ignored_linears(recipe, kinds),
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "version": "0.13",
    }


def _config(recipe: Recipe, _: Mapping[str, str]) -> dict[str, Any]:
    groups = {
        f"group_{i}": QuantizationScheme(
            targets=list(targets),
            weights=QuantizationArgs(**KINDS[kind].weights),
            input_activations=None if inputs is None else QuantizationArgs(**inputs),
            format=KINDS[kind].format,
        )
        for i, (kind, targets) in enumerate(recipe.groups)
        for inputs in (KINDS[kind].inputs,)
    }
    formats = {KINDS[kind].format for kind, _ in recipe.groups}
    config = QuantizationConfig(
        config_groups=groups,
        ignore=list(recipe.ignore),
        kv_cache_scheme=QuantizationArgs(**_args()) if recipe.kv_cache else None,
        quantization_status="compressed",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
    )
    return dict(config.model_dump(mode="json", exclude_none=False))


Spoil = Callable[[Tensors, dict[str, Any], random.Random], None]


def _scales(tensors: Tensors) -> list[str]:
    return sorted(name for name in tensors if name.rpartition(".")[2] in _SCALES)


def _drop(tensors: Tensors, _: dict[str, Any], chance: random.Random) -> None:
    for name in chance.sample(_scales(tensors), k=min(1, len(_scales(tensors)))):
        del tensors[name]


def _put(value: float) -> Spoil:
    """One value of one scale."""

    def spoil(tensors: Tensors, _: dict[str, Any], chance: random.Random) -> None:
        for name in chance.sample(_scales(tensors), k=min(1, len(_scales(tensors)))):
            tensors[name] = (scale := tensors[name].clone())
            scale.view(-1)[chance.randrange(scale.numel())] = value

    return spoil


def _swap(tensors: Tensors, _: dict[str, Any], chance: random.Random) -> None:
    """The scales of two modules, or of weights and activations of one, where they look alike."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in _scales(tensors):
        alike.setdefault((tensors[name].dtype, tensors[name].shape), []).append(name)
    pairs = [names for names in alike.values() if len(names) > 1]
    if pairs:
        one, other = chance.sample(chance.choice(pairs), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]


def _mislabel(_: Tensors, config: dict[str, Any], chance: random.Random) -> None:
    """The config states something else than what is stored."""
    groups = list(config.get("config_groups", {}).values())
    if "activation_scheme" in config:
        config["activation_scheme"] = {"static": "dynamic", "dynamic": "static"}[config["activation_scheme"]]
    elif config["quant_method"] == "modelopt" and config["quant_algo"] == "FP8":
        config["quant_algo"] = "NVFP4"
    elif config["quant_method"] == "compressed-tensors" and groups:
        group = chance.choice(groups)
        change = chance.choice(({"strategy": "channel"}, {"strategy": "tensor"}, {"num_bits": 4}, {"type": "int"}))
        group["weights"] = {**group["weights"], **change}


def _ignore_others(tensors: Tensors, config: dict[str, Any], chance: random.Random) -> None:
    """``ignore`` has a layer that is quantized, by its own name or a fused one, or lacks one that is not."""
    key = next((key for key in ("ignore", "ignored_layers", "exclude") if config.get(key)), None)
    if key is None:
        return
    if chance.random() < 0.5:
        config[key].remove(chance.choice(config[key]))
        return
    for scale in chance.sample(_scales(tensors), k=min(1, len(_scales(tensors)))):
        module = scale.rpartition(".")[0]
        config[key] = [*config[key], chance.choice((module, re.sub(r"\.(q|k|v)_proj$", ".qkv_proj", module)))]


#: What can be wrong with a checkpoint, each made in one place of it. Engines say what comes of it.
FAULTS: dict[str, Spoil] = {
    "missing": _drop, "nan": _put(math.nan), "zero": _put(0.0), "swapped": _swap, "mislabelled": _mislabel,
    "ignored": _ignore_others,
}  # fmt: skip

_SCALES = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
)
_GLOBAL = {"weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}
_MODELOPT_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_CONFIGS: dict[str, Callable[[Recipe, Mapping[str, str]], dict[str, Any]]] = {
    "compressed-tensors": _config,
    "modelopt": _modelopt_config,
    "modelopt MIXED_PRECISION": _mixed_config,
    "fp8": _fp8_config,
    "quark": _quark_config,
}


def _save(tensors: Tensors, folder: Path, recipe: Recipe) -> None:
    """In as many shards as asked for, each tensor in any of them: scales beside their weight or not."""
    if recipe.shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    chance = random.Random(recipe.seed)
    names = [f"model-{i + 1:05}-of-{recipe.shards:05}.safetensors" for i in range(recipe.shards)]
    home = {name: chance.choice(names) for name in tensors}
    for shard in set(home.values()):
        save_file({n: t.contiguous() for n, t in tensors.items() if home[n] == shard}, folder / shard, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": home}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
