"""Quantizes the trained model with llm-compressor, to FP8 and to NVFP4. Runs in the environment of the fixtures.

The text model gets a vision tower, the smallest there is and untrained: vLLM up to 0.26 loads no Qwen3.5 without one.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from producers.models import vision, vision_tokens
from safetensors.torch import load_file
from transformers import GenerationConfig, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from talk import text
from talk.model import BYTES, SETTINGS
from talk.tokenizer import byte_tokenizer

#: By name of the checkpoint. FP8: weights and activations per tensor, static. NVFP4: the same in 4 bits.
SCHEMES = {"talk-fp8": "FP8", "talk-nvfp4": "NVFP4"}
IGNORE = ("lm_head", "re:.*in_proj_a$", "re:.*in_proj_b$", "re:.*visual.*")
SAMPLES, SAMPLE_BYTES = 64, 256


def with_vision(trained: Path) -> Qwen3_5ForConditionalGeneration:
    """The trained text model beside a vision tower, in BF16."""
    torch.manual_seed(0)
    tower = vision(SETTINGS["hidden_size"], 32)
    config = Qwen3_5Config(text_config=SETTINGS, vision_config=tower, tie_word_embeddings=False, **vision_tokens())
    model = Qwen3_5ForConditionalGeneration(config).bfloat16()
    model.eval()
    weights = {_renamed(name): tensor for name, tensor in load_file(trained / "model.safetensors").items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or any("visual" not in name for name in missing):
        raise ValueError(f"not the trained model: {unexpected or missing}")
    model.config.get_text_config().dtype = torch.bfloat16
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=BYTES, pad_token_id=BYTES)
    return model


def _renamed(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def calibration() -> Dataset:
    """Pieces from all over the text that the model learned from."""
    learned = text.split(text.read()).learned.encode()
    starts = range(0, len(learned) - SAMPLE_BYTES, (len(learned) - SAMPLE_BYTES) // SAMPLES)
    ids = [list(learned[start : start + SAMPLE_BYTES]) for start in list(starts)[:SAMPLES]]
    return Dataset.from_list([{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids])


def quantize(source: Path, out: Path, scheme: str) -> None:
    """The documented one-shot recipe."""
    model = Qwen3_5ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    tokenizer = byte_tokenizer()
    oneshot(
        model=model,
        dataset=calibration(),
        recipe=QuantizationModifier(targets="Linear", scheme=scheme, ignore=list(IGNORE)),
        max_seq_length=SAMPLE_BYTES,
        num_calibration_samples=SAMPLES,
        processor=tokenizer,
    )
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Both checkpoints, and the text that the model has not seen."""
    parser = argparse.ArgumentParser(prog="talk.quantize", description=__doc__)
    parser.add_argument("trained", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    (given.out / "held_back.txt").write_text(text.split(text.read()).held_back)
    with tempfile.TemporaryDirectory(prefix="source-") as source:
        with_vision(given.trained).save_pretrained(source)
        for name, scheme in SCHEMES.items():
            quantize(Path(source), given.out / name, scheme)


if __name__ == "__main__":
    main()
