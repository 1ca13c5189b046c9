"""What a checkpoint lacks: layers that its config counts, a tensor that all layers like it have, the output head.

Engines load what there is and serve the rest from memory that nothing has filled: vLLM 0.32.0 and SGLang 0.5.23 were
run, and say nothing of it where the model is quantized.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from rewrite.ledger.fault import Fault
from rewrite.ledger.names import LINEARS, is_mtp, is_vision
from rewrite.quantization.architectures import text_config
from rewrite.quantization.model import Model

_LAYER = re.compile(r"((?:.*?\.)?layers)\.(\d{1,5})\.(.+)")
_WEIGHTS = frozenset(("weight", "weight_packed"))
_EMBEDDINGS = re.compile(r"(?:emb\w*|wte)$")
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
        yield from _torn(prefix, {number: held for number, held in stack.items() if number < count})
    untied = (text if "tie_word_embeddings" in text else config).get("tie_word_embeddings") is False
    if stack and untied and _has_head(config.get("architectures")):
        yield from _no_head(model, text.get("vocab_size"))


def _stacks(model: Model) -> dict[str, Stack]:
    """The layers of the language model, and of whatever else has layers. Experts are counted elsewhere."""
    found: dict[str, Stack] = defaultdict(lambda: defaultdict(set))
    for form, names in model.checkpoint.alike.items():
        if not _WEIGHTS.intersection(form.tensors) or ".experts." in form.pattern or is_vision(form.pattern):
            continue
        for name in names:
            at = None if is_mtp(name, {}) else _LAYER.fullmatch(name)
            if at is not None:
                found[at[1]][int(at[2])].add(f"{at[3]}.weight")
    return found


def _torn(prefix: str, stack: Stack) -> Iterator[Fault]:
    """A layer that is alone in having one or two weights less than others have. Where only one has them, and they are
    not those that every family has, that one may be the odd layer."""
    kinds = Counter(map(frozenset, stack.values()))
    for number, held in stack.items():
        own = frozenset(held)
        lost = min((other - own for other in kinds if own < other), key=len, default=frozenset())
        if kinds[own] > 1 or not 0 < len(lost) <= _FEW:
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


def _no_head(model: Model, words: object) -> Iterator[Fault]:
    """Heads have many names (lm_head, output, embed_out, output_layer), and all have a row for each word."""
    if type(words) is not int:
        return
    tables = [
        name
        for form, names in model.checkpoint.alike.items()
        for weight in _WEIGHTS.intersection(form.tensors)
        if len(shape := form.tensors[weight][1]) == 2 and shape[0] >= words
        for name in names
    ]
    if len(tables) == 1 and _EMBEDDINGS.search(tables[0]):
        expected = f"a table beside {tables[0]}: tie_word_embeddings is false"
        yield Fault("missing", "lm_head", "no tensor of it", expected, _AGAIN)
