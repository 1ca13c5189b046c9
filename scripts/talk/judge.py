"""lm-evaluation-harness on checkpoints that talk, through its back end `hf`: a Markdown table.

    scripts/judge_talk.sh

The models are given to the harness as objects of their own class: its back end asks transformers for a causal language
model, and that takes the text model out of a checkpoint with a vision tower under other names, so that `ignore` of the
quantization config does not match any more (see README.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("tasks")
NAMES = ("rewrite_talk", "rewrite_talk_cloze")


def judge(folder: Path) -> dict[str, float]:
    """Bits a byte of the held-back text, and how many last words of verses are right."""
    import torch
    import transformers
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    held = HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", device="cpu", batch_size=8)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found: Any = simple_evaluate(held, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0)
    loss, cloze = (found["results"][name] for name in NAMES)
    return {"bits_per_byte": round(loss["bits_per_byte,none"], 4), "exact_match": cloze["exact_match,word"]}


def main(words: list[str]) -> None:
    """A JSON object of the results, by the names of the folders."""
    print(json.dumps({Path(word).name: judge(Path(word)) for word in words}))


if __name__ == "__main__":
    main(sys.argv[1:])
