"""What llm-compressor writes: ``oneshot`` with QuantizationModifier (or GPTQ, AWQ), and ``model_free_ptq``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from producers.inputs import CALIBRATION_SAMPLES, SEQUENCE_LENGTH, byte_tokenizer, calibration_ids
from producers.models import load


def _weights(strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, **more}


TENSOR = _weights("tensor", observer="memoryless_minmax")
CHANNEL = _weights("channel", observer="memoryless_minmax")
STATIC = _weights("tensor", dynamic=False)
PER_TOKEN = _weights("token", dynamic=True)
PER_TENSOR_DYNAMIC = _weights("tensor", dynamic=True)
#: Schemes by the names that recipes use, beside the presets' own names.
SCHEMES = {
    "tensor+static": {"weights": TENSOR, "input_activations": STATIC},
    "tensor+token": {"weights": TENSOR, "input_activations": PER_TOKEN},
    "tensor+dynamic-tensor": {"weights": TENSOR, "input_activations": PER_TENSOR_DYNAMIC},
    "tensor": {"weights": TENSOR},
    "channel+token": {"weights": CHANNEL, "input_activations": PER_TOKEN},
    "channel+static": {"weights": CHANNEL, "input_activations": STATIC},
    "channel": {"weights": CHANNEL},
}


def _group(scheme: str, targets: list[str]) -> Any:
    from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme

    if scheme in SCHEMES:
        return QuantizationScheme(targets=targets, **SCHEMES[scheme])
    return preset_name_to_scheme(scheme, targets)


def _groups(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _group(scheme, targets) for name, (scheme, targets) in recipe["groups"].items()}


def _modifier(recipe: Mapping[str, Any]) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = GPTQModifier if recipe.get("modifier") == "GPTQModifier" else QuantizationModifier
    arguments = {k: v for k, v in recipe.items() if k not in ("groups", "max_shard_size", "modifier")}
    if "groups" in recipe:
        arguments["config_groups"] = _groups(recipe)
    return modifier(**arguments)


def oneshot(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """The documented call, with byte tokens."""
    from datasets import Dataset
    from llmcompressor import oneshot as run

    model, tokenizer = load(base), byte_tokenizer()
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration_ids().tolist()]
    run(
        model=model,
        dataset=Dataset.from_list(samples),
        recipe=_modifier(recipe),
        max_seq_length=SEQUENCE_LENGTH,
        num_calibration_samples=CALIBRATION_SAMPLES,
        processor=tokenizer,
    )
    model.save_pretrained(out, save_compressed=True, max_shard_size=recipe.get("max_shard_size", "5GB"))
    tokenizer.save_pretrained(out)


def model_free(_model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """``model_free_ptq``: from file to file, no calibration."""
    from compressed_tensors.quantization import QuantizationConfig
    from llmcompressor import model_free_ptq

    arguments = {k: v for k, v in recipe.items() if k not in ("groups", "named")}
    if "groups" in recipe:
        ignore = arguments.pop("ignore", [])
        arguments["config"] = QuantizationConfig(config_groups=_groups(recipe), ignore=ignore)
    elif "named" in recipe:
        arguments["scheme"] = _group(recipe["named"], ["Linear"])
    model_free_ptq(str(base), str(out), device="cpu", **arguments)
