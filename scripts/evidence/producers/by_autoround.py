"""What Intel AutoRound writes, in its own format, in llm-compressor's and in those of AutoGPTQ and AutoAWQ."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from producers.inputs import calibration_ids
from producers.models import load


def quantize(model: str, base: Path, out: Path, recipe: Mapping[str, Any]) -> None:
    """Round to nearest (``iters=0``), with byte tokens."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    samples = [ids.clone() for ids in calibration_ids()]
    arguments = {k: v for k, v in recipe.items() if k != "format"}
    masks = [
        torch.ones_like(ids) if "moe" not in model and "text" not in model else torch.ones_like(ids).bool()
        for ids in samples
    ]
    data = torch.utils.data.DataLoader(
        [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(samples, masks, strict=True)], batch_size=1
    )  # type: ignore[arg-type,var-annotated]
    if "vl" in model:
        arguments["processor"] = tokenizer
    rounding = AutoRound(
        load(base), tokenizer, iters=0, nsamples=len(samples), seqlen=64, batch_size=1, dataset=data, device_map="cpu",
        low_gpu_mem_usage=False, **arguments,
    )  # fmt: skip
    rounding.quantize_and_save(output_dir=str(out), format=recipe["format"])
    folders = [path for path in out.iterdir() if path.is_dir()]
    if folders and not (out / "config.json").exists():
        for path in folders[0].iterdir():
            shutil.move(path, out)
        folders[0].rmdir()
