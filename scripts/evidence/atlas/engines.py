"""Where an engine says which class serves which ``architectures`` of a config.json."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping

from atlas.source import Class, Package, find_class

_VLLM, _SGLANG = "vllm.model_executor.models", "sglang.srt.models"
_REGISTRY = "_MODELS"
#: Drafts of a speculative decoding are no models of their own, and the classes that make one of transformers' fuse what
#: transformers has, by rules of their own.
_LEFT_OUT = ("_SPECULATIVE_DECODING_MODELS", "_TRANSFORMERS_BACKEND_MODELS", "_SUBPROCESS", "_VLLM_MODELS")


def vllm_models(package: Package) -> Iterator[tuple[str, Class | None]]:
    """``registry.py``: tables ``{architecture: (module, class)}``."""
    registry = package.module(f"{_VLLM}.registry")
    for name, value in registry.defined.items() if registry else ():
        if name.endswith(_REGISTRY) and not name.startswith(_LEFT_OUT) and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(entry, ast.Tuple) and len(entry.elts) == 2:
                    module, cls = (ast.literal_eval(each) for each in entry.elts)
                    found = package.resolve(module if module.startswith("vllm.") else f"{_VLLM}.{module}", cls)
                    node = found[1] if found else None
                    yield (
                        str(key.value),
                        Class(package, found[0], node) if found and isinstance(node, ast.ClassDef) else None,
                    )


def sglang_models(package: Package) -> Iterator[tuple[str, Class | None]]:
    """``EntryClass`` of every file: the name of the class is the architecture."""
    for file in sorted((package.root / "srt" / "models").glob("*.py")):
        module = package.module(f"{_SGLANG}.{file.stem}")
        entry = module.defined.get("EntryClass") if module else None
        if module is None or not isinstance(entry, ast.expr) or file.stem == "transformers":
            continue
        for each in entry.elts if isinstance(entry, ast.List | ast.Tuple) else [entry]:
            yield ast.unparse(each), find_class(package, module.name, each)


def model_types(package: Package) -> dict[str, str]:
    """transformers: the architecture of a ``model_type``, for configs that state none (``text_config``)."""
    auto = package.module("transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for table in ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"):
        value = auto.defined.get(table) if auto else None
        for each in ast.walk(value) if value is not None else ():
            if isinstance(each, ast.Tuple) and len(each.elts) == 2:
                pair = [part.value for part in each.elts if isinstance(part, ast.Constant)]
                if len(pair) == 2:
                    found.setdefault(str(pair[0]), str(pair[1]))
    return found


ENGINES: Mapping[str, tuple[str, Callable[[Package], Iterator[tuple[str, Class | None]]]]] = {
    "vLLM": ("vllm", vllm_models),
    "SGLang": ("sglang", sglang_models),
}
