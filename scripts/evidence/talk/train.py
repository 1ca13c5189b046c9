"""Trains the model that talks, on one core of a CPU: 25 minutes.

    PYTHONPATH=scripts .venv/bin/python -m talk.train FOLDER

Writes the BF16 model. Seeded; another kind of CPU, or another version of torch, rounds otherwise and gives another
model, which writes as well.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3_5ForCausalLM

from talk import text
from talk.model import new_model

SEED = 38197
STEPS = 2200
BATCH_BYTES = 2048
SHORT, LONG = 128, 256  # bytes of a sample: short ones first, which are faster
MUON_RATE, ADAM_RATE = 0.02, 4e-3


def encode(words: str) -> torch.Tensor:
    """One token a byte."""
    return torch.tensor(list(words.encode()), dtype=torch.long)


def samples(tokens: torch.Tensor, steps: int) -> Iterator[torch.Tensor]:
    """Batches from anywhere in the text."""
    for step in range(steps):
        length = SHORT if step < steps * 0.6 else LONG
        starts = torch.randint(len(tokens) - length, (BATCH_BYTES // length,))
        yield torch.stack([tokens[start : start + length] for start in starts.tolist()])


def optimizers(model: Qwen3_5ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, Adam for all else."""
    named = list(model.named_parameters())
    inside = {name for name, each in named if each.ndim == 2 and "layers." in name and min(each.shape) > 16}
    return [
        torch.optim.Muon([each for name, each in named if name in inside], lr=MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(
            [each for name, each in named if name not in inside], lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0
        ),
    ]


def rate(step: int, steps: int) -> float:
    """Of the full learning rate: warm-up, a plateau, and down to zero in a line."""
    return min((step + 1) / 50, 1.0, (steps - step) / (steps * 0.6))


def loss_of(model: Qwen3_5ForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss: torch.Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def train(tokens: torch.Tensor, steps: int) -> Qwen3_5ForCausalLM:
    """A trained model, in F32."""
    torch.manual_seed(SEED)
    model = new_model()
    steppers = optimizers(model)
    full = [stepper.param_groups[0]["lr"] for stepper in steppers]
    began, seen = time.monotonic(), 0.0
    for step, batch in enumerate(samples(tokens, steps)):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper, most in zip(steppers, full, strict=True):
            stepper.param_groups[0]["lr"] = most * rate(step, steps)
            stepper.step()
            stepper.zero_grad()
        seen = loss.item() if step == 0 else 0.98 * seen + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"{step + 1} of {steps}: {seen:.3f} nats a byte, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    return model


@torch.no_grad()
def held_back_loss(model: Qwen3_5ForCausalLM, tokens: torch.Tensor) -> float:
    """Nats a byte, in windows of LONG bytes."""
    rows = tokens[: len(tokens) // LONG * LONG].view(-1, LONG)
    losses = [model(input_ids=each, labels=each, use_cache=False).loss for each in rows.split(32)[:8]]
    return float(torch.stack(losses).mean())


def main() -> None:
    """Train, say how good it is, write it."""
    parser = argparse.ArgumentParser(prog="talk.train", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = text.split(text.read())
    model = train(encode(parts.learned), given.steps)
    print(f"held-back text: {held_back_loss(model, encode(parts.held_back)):.4f} nats a byte")
    model.bfloat16().save_pretrained(given.folder)


if __name__ == "__main__":
    main()
