"""How engines find the scheme of a layer in a compressed-tensors config: by their own rules, not by the library's.

Read in vLLM 0.19.1 to 0.32.0 and SGLang 0.5.9 to 0.5.23 (``compressed_tensors/utils.py``: ``should_ignore_layer``,
``find_matched_target``), and run with random configs (``scripts/evidence/loader_matrix``):

- Targets are tried in the order of the config; compressed-tensors tries names, then patterns in alphabetical order.
- A fused layer is looked up under its own name, its class (``…Linear``) and its parts: in this order before vLLM 0.27
  and in SGLang, its parts before its class from there on.
- A layer that no target matches, and no entry of ``ignore``, raises in SGLang and before vLLM 0.21; not where a config
  has no targets at all (a KV cache alone is quantized).
- The parts of a fused layer are looked up where a model says that the layer has some (``packed_modules_mapping``): in
  vLLM all models here do; in SGLang Qwen3.5's (from 0.5.10), MiniCPM-V's and Qwen3-Next's, DeepSeek-V3's for
  ``fused_qkv_a_proj`` only, and not those of the Llama kind, where targets and ``ignore`` must have the fused name.
- vLLM gives modules other names than the stored ones: patterns see its names, exact entries are renamed with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from rewrite.ledger.layers import plain_layers
from rewrite.loaders.outcome import SENTINEL, Outcome
from rewrite.quantization.architectures import text_config
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.dialects.fp8 import Fp8, parts_of
from rewrite.quantization.dialects.modelopt import ModelOpt
from rewrite.quantization.dialects.modelopt_mixed import ModelOptMixed
from rewrite.quantization.dialects.quark import Quark
from rewrite.quantization.groups import Module, is_table
from rewrite.quantization.model import Kind, Model
from rewrite.quantization.scheme import Scheme

#: Linears that engines never quantize, whatever the config says, and what is not loaded with the language model.
_NEVER_LOOKED_UP = ("mlp.gate", "shared_expert_gate", "lm_head")


@dataclass(frozen=True)
class Lookup:
    """The rules of some engine versions."""

    parts_before_class: bool
    unmatched_raises: bool
    served_name: Callable[[str], str]  # of a module, by its stored name
    knows_parts: Callable[[str, str], bool] = lambda _model_type, _layer: True  # of the fused layer of this last name


def sglang_name(name: str) -> str:
    """SGLang keeps the names of modules, and has another one for a fused layer of DeepSeek."""
    return f"{name}_with_mqa" if name.endswith(".fused_qkv_a_proj") else name


def vllm_name(name: str) -> str:
    """vLLM ``hf_to_vllm_mapper`` of vision-language models; the others keep their names."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return name.removeprefix("model.") if name.startswith("model.visual.") else name


def sglang_knows_parts(model_type: str, layer: str) -> bool:
    """SGLang 0.5.10 to 0.5.23, ``packed_modules_mapping`` of the model classes; of Qwen3.5 0.5.9 has none."""
    if model_type == "deepseek_v3":
        return layer == "fused_qkv_a_proj"
    return model_type.startswith(("qwen3_5", "qwen3_next", "minicpmv"))


VLLM_RAISES = Lookup(False, True, vllm_name)  # to 0.20
VLLM_CLASS_FIRST = Lookup(False, False, vllm_name)  # 0.21 to 0.26
VLLM = Lookup(True, False, vllm_name)  # from 0.27
SGLANG = Lookup(False, True, sglang_name, sglang_knows_parts)
LOOKUPS = (VLLM_RAISES, VLLM_CLASS_FIRST, VLLM, SGLANG)


@dataclass(frozen=True)
class ServedLayer:
    """A layer as engines build it: the name it is looked up by, the names of the stored modules that become it, and
    modules like these."""

    name: str
    parts: tuple[str, ...]
    modules: tuple[Module, ...]


def served_layers(model: Model) -> Iterator[ServedLayer]:
    """Every linear layer that engines look up: fused groups, and all other modules on their own."""
    grouped: set[str] = set()
    for group in model.groups.whole:
        parts = tuple(module.name for module in group.modules)
        grouped.update(parts)
        yield ServedLayer(group.name, parts, group.modules)
    for kind in model.kinds:
        yield from (ServedLayer(name, (name,), (kind.first,)) for name in _looked_up(kind) if name not in grouped)


def _looked_up(kind: Kind) -> Iterable[str]:
    """The modules that engines look up on their own. Of the experts of a layer they look up the first only."""
    pattern = kind.form.pattern
    if is_table(pattern) or pattern.startswith("mtp.") or pattern.endswith(_NEVER_LOOKED_UP):
        return ()
    return [name for name in kind.names if ".experts.0." in name] if ".experts." in pattern else kind.names


def misread(model: Model, lookups: Sequence[Lookup] = LOOKUPS) -> dict[Lookup, Outcome]:
    """What goes wrong with each of these ways of looking layers up; those by which all is well are left out."""
    missed = _missed_by_sglang(model)
    return _misread(model, lookups) | ({} if missed is None else {SGLANG: missed})


def _misread(model: Model, lookups: Sequence[Lookup]) -> dict[Lookup, Outcome]:
    dialect = model.dialect
    if isinstance(dialect, Quark):
        return dict(_misread_quark(model, dialect))
    if isinstance(dialect, Fp8):
        return dict(_misread_fp8(model, dialect))
    if isinstance(dialect, ModelOpt | ModelOptMixed):
        return dict(_misread_modelopt(model, dialect))
    if not isinstance(dialect, CompressedTensors):
        return {}
    alike: dict[tuple[object, ...], ServedLayer] = {}  # layers that no pattern of the config can tell apart
    for layer in served_layers(model):
        parts = zip(map(dialect.shape_of, layer.parts), layer.modules, strict=True)
        key = (dialect.shape_of(layer.name), *((shape, m.scheme, m.plain) for shape, m in parts))
        alike.setdefault(key, layer)
    found = {}
    for lookup in lookups:
        problems = (_problem(layer, model, dialect, lookup) for layer in alike.values())
        all_problems = chain(problems, [_vocabulary(model, dialect, lookup)])
        worst = max((p for p in all_problems if p is not None), key=lambda p: p.severity, default=None)
        if worst is not None:
            found[lookup] = worst
    return found


def plain_by_name(model: Model) -> frozenset[Lookup]:
    """The ways by which every plain layer that the config quantizes stands in ``ignore``, under an engine's name, or by
    ModelOpt's entries as engines read these: vLLM as a part of a name, SGLang as one of the words between the dots
    (0.32.0 and 0.5.23, ``is_layer_excluded``)."""
    dialect, plain = model.dialect, list(plain_layers(model))
    if not plain or not isinstance(dialect, CompressedTensors | ModelOpt):
        return frozenset()

    fused_names = {module.name: group.name for group in model.groups.whole for module in group.modules}

    def finds(way: Lookup, name: str) -> bool:
        served = way.served_name(name)
        if isinstance(dialect, CompressedTensors):
            return dialect.ignores(name, served) or dialect.ignores(served, served)
        fused = fused_names.get(name, name)
        return any(each in (fused.split(".") if way is SGLANG else fused) for each in dialect.ignored)

    return frozenset(way for way in LOOKUPS if all(finds(way, name) for name in plain))


_PROJECTION = re.compile(r"(.*vision.*\.(?:attention|self_attn)\.)o(?:ut)?_proj")


def _missed_by_sglang(model: Model) -> Outcome | None:
    """Plain modules that the config names, and that SGLang 0.5.23 looks up by other names: ``proj`` in the towers of
    some models (``pixtral.py``, ``gemma3_mm.py``), all of Kimi-K2.5 without ``language_model.`` in compressed-tensors.
    """
    model_type, dialect = model.checkpoint.config.value.get("model_type"), model.dialect
    kimi = model_type == "kimi_k25" and isinstance(dialect, CompressedTensors)
    for kind in model.kinds if kimi or model_type in ("mistral3", "gemma3") else ():
        name = kind.names[0]
        served = name.removeprefix("language_model.") if kimi else _PROJECTION.sub(r"\1proj", name)
        alone = dialect.skips(served) if isinstance(dialect, Fp8) else dialect.scheme(served) is None
        listed = dialect.names(name) if isinstance(dialect, Fp8) else dialect.scheme(name) is None
        if kind.first.plain and served != name and listed and not alone and not is_table(name):
            said = f"takes {name} for quantized: it is {served} there, which the config does not leave plain"
            return Outcome("fails to load", said) if kimi else Outcome("garbled", said, (), SENTINEL)
    return None


def _misread_fp8(model: Model, dialect: Fp8) -> Iterator[tuple[Lookup, Outcome]]:
    """SGLang 0.5.23 looks for the names of its parts, of a layer that is stored fused, too (``is_layer_skipped``): a
    plain one that ``ignored_layers`` has by its own name alone is cast to FP8 and gets scales that nothing fills."""
    for name in (name for kind in model.kinds if kind.first.plain for name in kind.names if dialect.names(name)):
        if (parts := parts_of(name)) and not all(map(dialect.names, parts)):
            yield (
                SGLANG,
                Outcome("garbled", f"casts the plain {name} to FP8: ignored_layers lacks its parts", (), SENTINEL),
            )
            return


def _misread_modelopt(model: Model, dialect: ModelOpt | ModelOptMixed) -> Iterator[tuple[Lookup, Outcome]]:
    """An entry of ``ignore`` that is the name of a fused layer whose parts are quantized: vLLM 0.32.0 was seen to end
    with an AttributeError, SGLang 0.5.23 to serve codes as weights."""
    left_alone = ModelOpt(dialect.value)
    for group in model.groups.whole:
        stored = not all(module.plain for module in group.modules) and group.name not in model.kind_of
        if stored and left_alone.scheme(group.name) is None:
            said = Outcome("not known", f"takes {group.name} for plain: ignore has that name, and it is quantized")
            yield from ((lookup, said) for lookup in LOOKUPS)
            return


def _misread_quark(model: Model, dialect: Quark) -> Iterator[tuple[Lookup, Outcome]]:
    """vLLM passes the names and globs of ``layer_quant_config`` over for layers that are stored fused (0.32
    ``QuarkConfig._find_matched_config``)."""
    grouped = {group.name for group in model.groups.whole}
    for lookup in LOOKUPS:
        for layer in served_layers(model):
            wanted = {None if module.plain else module.scheme for module in layer.modules}
            by_name = lookup is SGLANG or layer.parts != (layer.name,) or layer.name not in grouped
            found = {dialect.scheme_in_engines(part, lookup.served_name, by_name=by_name) for part in layer.parts}
            if found != wanted or len(found) > 1:
                yield lookup, Outcome("not known", f"looks {layer.name} up in another way than Quark does")
                break


def _problem(layer: ServedLayer, model: Model, dialect: CompressedTensors, lookup: Lookup) -> Outcome | None:
    ignored = _ignored(layer, model, dialect, lookup)
    if ignored is None:
        return Outcome("fails to load", f"ignore names some parts of {layer.name} only")
    if ignored:
        return _unless_alike(layer, None)
    group = _group(layer, model, dialect, lookup)
    if group is None and lookup.unmatched_raises and dialect.has_targets:
        return Outcome("fails to load", f"finds no target for {layer.name}")
    return _unless_alike(layer, None if group is None else dialect.scheme_of_group(group))


def _vocabulary(model: Model, dialect: CompressedTensors, lookup: Lookup) -> Outcome | None:
    """vLLM from 0.21 quantizes ``lm_head``, too, where a pattern among the targets matches it; 0.19.1 and SGLang do
    not. In vision-language models it has another name, ``language_model.lm_head``, which the entry ``lm_head`` of
    ``ignore`` misses: seen in 0.32, which casts it to FP8, or raises."""
    if lookup.unmatched_raises:  # vLLM before 0.21, SGLang
        return None
    nested = any(kind.form.pattern.startswith("model.language_model.") for kind in model.kinds)
    for kind in model.kinds:
        name = kind.names[0]
        if not name.endswith("lm_head") or not kind.first.plain:
            continue
        served = f"language_model.{name}" if nested else name
        ignored = dialect.ignores("" if nested else name, served)
        if not ignored and dialect.first_group("" if nested else name, served) is not None:
            return Outcome("not known", f"calls {name} {served}: a target matches that, and ignore does not")
    return None


def _unless_alike(layer: ServedLayer, found: Scheme | None) -> Outcome | None:
    """What happens with the parts of a layer whose scheme is not the one that the engine finds is not modeled."""
    if all(module.scheme == found or (module.plain and found is None) for module in layer.modules):
        return None
    said = "not quantized" if found is None else found.text
    return Outcome("not known", f"looks {layer.name} up as {said}, which is not how all of it is stored")


def _knows_parts(layer: ServedLayer, model: Model, lookup: Lookup) -> bool:
    model_type = str(text_config(model.checkpoint.config.value).get("model_type"))
    return lookup.knows_parts(model_type, layer.name.rpartition(".")[2])


def _ignored(layer: ServedLayer, model: Model, dialect: CompressedTensors, lookup: Lookup) -> bool | None:
    """Whether ``ignore`` names the layer; None: some of its parts only."""
    served = lookup.served_name(layer.name)
    if not _knows_parts(layer, model, lookup):
        return dialect.ignores(layer.name, served)
    if dialect.ignores(layer.name, served, exactly=not lookup.parts_before_class):
        return True
    answers = {dialect.ignores(part, lookup.served_name(part)) for part in layer.parts}
    return answers.pop() if len(answers) == 1 else None


def _group(layer: ServedLayer, model: Model, dialect: CompressedTensors, lookup: Lookup) -> str | None:
    """The config group of the layer."""
    by_name = dialect.first_group(layer.name, lookup.served_name(layer.name))
    if by_name is not None:
        return by_name
    of_parts = [dialect.first_group(part, lookup.served_name(part)) for part in layer.parts]
    by_parts = of_parts[0] if all(of_parts) and _knows_parts(layer, model, lookup) else None
    by_class = dialect.class_group()
    return (by_parts or by_class) if lookup.parts_before_class else (by_class or by_parts)
