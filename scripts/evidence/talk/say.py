"""What a model says, and how well it knows text that it has not seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROMPT = "And God said unto "
WINDOW = 256  # bytes
HELD_BACK = Path(__file__).resolve().parents[3] / "tests" / "talk" / "held_back.txt"


@dataclass(frozen=True)
class Said:
    """The loss on held-back text, in nats a byte, and what follows the prompt, by the likeliest byte each time."""

    nats: float
    text: str

    @property
    def perplexity(self) -> float:
        """Of a byte: among so many equally likely ones the model would choose."""
        return math.exp(self.nats)


@torch.no_grad()
def ask(model: Any, *, windows: int = 32, length: int = 80) -> Said:
    """The loss over ``windows`` pieces of the held-back text, without the first byte of each; ``length`` bytes."""
    pieces = torch.tensor(list(HELD_BACK.read_bytes()[: WINDOW * windows])).view(-1, WINDOW)
    logits = model(input_ids=pieces).logits[:, :-1].flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits.float(), pieces[:, 1:].flatten()).item()
    prompt = torch.tensor([list(PROMPT.encode())])
    answer = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, do_sample=False
    )
    return Said(nats, bytes(each % 256 for each in answer[0, prompt.shape[1] :].tolist()).decode("latin-1"))
