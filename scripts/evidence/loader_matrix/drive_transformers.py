"""transformers with compressed-tensors: `from_pretrained`, nothing replaced."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from engines import driver
from engines.driver import Job

from loader_matrix.comparing import compare

if TYPE_CHECKING:
    import torch


def start() -> str:
    """Import transformers."""
    import transformers

    driver.preload(
        "compressed_tensors",
        "transformers.quantizers.auto",
        *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "qwen3_5")),
    )
    return transformers.__version__


def load(job: Job) -> torch.nn.Module:
    """The model that the checkpoint's `architectures` names, loaded by `from_pretrained`; raises where it can't run.

    It takes a scale of any shape, and only finds out in its first forward pass. That runs on a copy, so that nothing
    which the pass may unpack is measured.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(job.model)
    model_class = getattr(transformers, config.architectures[0])
    model: torch.nn.Module = model_class.from_pretrained(job.model)
    with torch.no_grad():
        copy.deepcopy(model)(input_ids=torch.arange(10, 20)[None])
    return model


if __name__ == "__main__":
    driver.run(("transformers", "compressed_tensors"), start, load, compare)
