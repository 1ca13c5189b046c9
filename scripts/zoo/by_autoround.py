"""What Intel AutoRound writes, in its own format, in llm-compressor's and in those of AutoGPTQ and AutoAWQ."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fixtures.inputs import calibration_ids

from zoo.entry import Entry
from zoo.models import load

_PLAIN = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
AB = {"in_proj_a": _PLAIN, "in_proj_b": _PLAIN}
MOE = {**AB, "shared_expert_gate": _PLAIN}


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


def _of(scheme: Any, form: str, layer_config: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"scheme": scheme, "format": form, "layer_config": layer_config and dict(layer_config), **more}


LLMC, OWN = "llm_compressor", "auto_round"
TABLE = (
    Entry("autoround-fp8-static-qwen3_5-text", "qwen3_5-text", quantize, _of("FP8_STATIC", LLMC, AB)),
    Entry("autoround-fp8-static-qwen3_5-vl-default", "qwen3_5-vl", quantize, _of("FP8_STATIC", LLMC)),
    Entry("autoround-fp8-static-own-qwen3_5-text", "qwen3_5-text", quantize, _of("FP8_STATIC", OWN, AB)),
    Entry("autoround-fp8-static-llama", "llama", quantize, _of("FP8_STATIC", LLMC)),
    Entry("autoround-fp8-static-qwen3_5-moe", "qwen3_5-moe", quantize, _of("FP8_STATIC", LLMC, MOE)),
    Entry("autoround-fp8-block-qwen3_5-text", "qwen3_5-text", quantize, _of("FP8_BLOCK", LLMC, AB)),
    Entry("autoround-fp8-block-own-llama", "llama", quantize, _of("FP8_BLOCK", OWN)),
    Entry("autoround-nvfp4-qwen3_5-text", "qwen3_5-text", quantize, _of("NVFP4", LLMC, AB)),
    Entry("autoround-mxfp4-qwen3_5-text", "qwen3_5-text", quantize, _of("MXFP4", LLMC, AB)),
    Entry("autoround-mxfp4-own-llama", "llama", quantize, _of("MXFP4", OWN)),
    Entry("autoround-w4a16-own-qwen3_5-text", "qwen3_5-text", quantize, _of("W4A16", OWN, AB)),
    Entry("autoround-w4a16-llmc-qwen3_5-text", "qwen3_5-text", quantize, _of("W4A16", LLMC, AB)),
    Entry("autoround-w4a16-gptq-llama", "llama", quantize, _of("W4A16", "auto_gptq")),
    Entry("autoround-w4a16-awq-llama", "llama", quantize, _of("W4A16", "auto_awq")),
    Entry("autoround-int8-llama", "llama", quantize, _of("INT8_W8A8", LLMC)),
)
