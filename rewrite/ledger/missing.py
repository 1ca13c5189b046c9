"""What a checkpoint lacks: layers and experts that its config counts, biases that it promises, a tensor that all layers
like it have, the output head. And what it has more of than the config counts.

Engines load what there is and serve the rest from memory that nothing has filled: vLLM 0.32.0 and SGLang 0.5.23 were
run, and say nothing of it where the model is quantized.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rewrite.checkpoint.forms import Form
from rewrite.ledger.fault import Fault
from rewrite.ledger.names import LINEARS, is_mtp, is_vision, mtp_layers
from rewrite.quantization.architectures import text_config
from rewrite.quantization.model import Model

_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d{1,5})\.(.+)")
_WEIGHTS = frozenset(("weight", "weight_packed"))
_EMBEDDINGS = re.compile(r"(?:emb\w*|wte)$")
_LAST_NORM = re.compile(r"(?!.*\blayers\.)(?:.*\.)?(?:\w*norm\w*|ln_f)")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WORDS = "set vocab_size in config.json, or pad the tables of words"
_FIT = "set the number of experts in config.json, or leave these tensors out"
_COUNT = "set num_hidden_layers in config.json, or leave these tensors out"
_AGAIN = "download it, or export the model, again"
_FEW = 2  # layers of another kind differ by more

Stack = dict[int, set[str]]  # by the number of a layer: its weights


def missing_faults(model: Model) -> Iterator[Fault]:
    """Headers and config only."""
    config = model.checkpoint.config.value
    text = text_config(config)
    prefix, stack = max(_stacks(model).items(), key=lambda each: len(each[1]), default=("", {}))
    count = text.get("num_hidden_layers")
    if stack and type(count) is int and 0 < count < 10**5:
        if lost := [number for number in range(count) if number not in stack]:
            expected = f"{count} layers, as config.json says"
            yield Fault("missing", f"{prefix}.{lost[0]}", "no tensor of it", expected, _AGAIN, len(lost))
        counted = max(count, len(str(text.get("hybrid_override_pattern", ""))))  # of Nemotron-H, a letter for a layer
        if more := sorted(number for number in stack if number >= counted and not mtp_layers(text)):
            yield Fault(
                "uncounted", f"{prefix}.{more[0]}", "", f"{count} layers, as config.json says", _COUNT, len(more)
            )
        yield from _torn(prefix, {number: held for number, held in stack.items() if number < count})
    yield from _experts(model, text)
    yield from _biases(model, text)
    untied = (text if "tie_word_embeddings" in text else config).get("tie_word_embeddings") is False
    if stack and _has_head(config.get("architectures")):
        has_norms = any("norm" in name for held in stack.values() for name in held)  # OLMo has none anywhere
        yield from _around(model, prefix, text.get("vocab_size"), untied, has_norms)


def _stacks(model: Model) -> dict[str, Stack]:
    """The layers of the language model, and of whatever else has layers. Experts are counted elsewhere."""
    found: dict[str, Stack] = defaultdict(lambda: defaultdict(set))
    for form, names in model.checkpoint.alike.items():
        if ".experts." in form.pattern or is_vision(form.pattern):
            continue
        kinds = _of_model(form)
        for name in names if kinds else ():
            at = None if is_mtp(name, {}) else _LAYER.fullmatch(name)
            if at is not None:
                found[at[1]][int(at[2])].update(f"{at[3]}.{kind}" for kind in kinds)
    return found


def _of_model(form: Form) -> set[str]:
    """What a module has whether it is quantized or not: its weight and biases, or the parameters that it is."""
    if _WEIGHTS.intersection(form.tensors):
        return {"weight", *(kind for kind in form.tensors if kind.endswith("bias"))}
    return set() if form.pattern.endswith("weight") else {kind for kind in form.tensors if "scale" not in kind}


def _experts(model: Model, text: Mapping[str, Any]) -> Iterator[Fault]:
    """Experts that are stored one by one, against the number that the config states; each part of them."""
    count = next((value for key in _EXPERTS if type(value := text.get(key)) is int and value > 0), None)
    held: dict[tuple[str, str], set[int]] = defaultdict(set)
    for form, names in model.checkpoint.alike.items() if count is not None else ():
        for name in names if ".experts." in form.pattern and _WEIGHTS.intersection(form.tensors) else ():
            layer, _, rest = name.rpartition(".experts.")
            number, _, part = rest.partition(".")
            if number.isdecimal():
                held[layer, part].add(int(number))
    for (layer, part), numbers in held.items():
        expected = f"{count} experts, as config.json says"
        if lost := [number for number in range(count or 0) if number not in numbers]:
            yield Fault("missing", f"{layer}.experts.{lost[0]}.{part}", "no such tensor", expected, _AGAIN, len(lost))
        if more := [number for number in numbers if number >= (count or 0)]:
            where = f"{layer}.experts.{min(more)}.{part}"
            yield Fault("uncounted", where, "", expected, _FIT, len(more))


def _biases(model: Model, text: Mapping[str, Any]) -> Iterator[Fault]:
    """Those that the config promises, where not a single one is stored."""
    for key, part in (("attention_bias", "q_proj"), ("mlp_bias", "gate_proj")):
        forms = [(form, names) for form, names in model.checkpoint.alike.items() if form.pattern.endswith(f".{part}")]
        own = [(form, names) for form, names in forms if not is_vision(form.pattern)]
        if text.get(key) is True and own and not any("bias" in form.tensors for form, _ in own):
            names = [name for _, found in own for name in found]
            yield Fault("missing", f"{names[0]}.bias", "no such tensor", f"biases: {key} is true", _AGAIN, len(names))


def _torn(prefix: str, stack: Stack) -> Iterator[Fault]:
    """A layer that is alone in lacking one or two modules that others have, or parts of them. Where only one has them,
    and they are not those that every family has, that one may be the odd layer."""
    kinds = Counter(map(frozenset, stack.values()))
    for number, held in stack.items():
        own = frozenset(held)
        lost = min((other - own for other in kinds if own < other), key=len, default=frozenset())
        if kinds[own] > 1 or not 0 < len({name.rpartition(".")[0] for name in lost}) <= _FEW:
            continue
        for name in sorted(lost):
            if _is_usual(name) or sum(name in other for other in stack.values()) > 1:
                yield Fault("missing", f"{prefix}.{number}.{name}", "no such tensor", "one, as in other layers", _AGAIN)


def _is_usual(name: str) -> bool:
    module = name.split(".")[-2]
    return module in LINEARS or module.endswith("norm")


def _has_head(architectures: object) -> bool:
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return isinstance(first, str) and first.endswith(("ForCausalLM", "ForConditionalGeneration"))


def _around(model: Model, prefix: str, words: object, untied: bool, has_norms: bool) -> Iterator[Fault]:
    """The embeddings, the last norm and the head. Heads have many names (lm_head, output, embed_out, output_layer), and
    all have a row for each word, outside of the layers."""
    if type(words) is not int:
        return
    for form, names in model.checkpoint.alike.items():
        (rows, *_) = (*form.tensors.get("weight", ("", ()))[1], words)
        if rows < words and form.pattern.endswith(".embed_tokens") and not is_vision(form.pattern):
            yield Fault("uncounted", names[0], f"{rows} rows", f"{words}, as config.json says", _WORDS, len(names))
    tables = [
        name
        for form, names in model.checkpoint.alike.items()
        for weight in _WEIGHTS.intersection(form.tensors)
        if len(shape := form.tensors[weight][1]) == 2 and shape[0] >= words
        for name in names
        if not _LAYER.fullmatch(name)
    ]
    lost = ["lm_head"] if len(tables) == 1 and _EMBEDDINGS.search(tables[0]) else []
    lost += ["embeddings"] if tables == ["lm_head"] else []
    if untied and lost:
        expected = f"a table beside {tables[0]}: tie_word_embeddings is false"
        yield Fault("missing", lost[0], "no tensor of it", expected, _AGAIN)
    apart = (names[0] for names in model.checkpoint.alike.values() if not is_vision(names[0]))
    if tables and has_norms and not any(map(_LAST_NORM.fullmatch, apart)):
        where = f"{prefix.removesuffix('layers')}norm"
        yield Fault("missing", where, "no tensor of it", "a norm behind the layers", _AGAIN)
