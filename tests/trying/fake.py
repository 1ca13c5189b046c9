"""An engine of one module, for the driver: a fused layer with a slot for each partition's scale, as real ones have.

Its loader can have the faults of vLLM issue #38197 and its like. It reads files with safetensors, and knows nothing of
the driver but the class that it derives from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rewrite.trying import driver

ROWS, COLUMNS = 8, 16
PARTS = ("q", "k", "v")


def write(folder: Path, layers: int = 2) -> Path:
    """A checkpoint of FP8 projections with a scale each, and a norm."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        tensors[f"{stem}.norm.weight"] = torch.ones(COLUMNS, dtype=torch.bfloat16)
        for number, part in enumerate(PARTS):
            codes = torch.randn(ROWS, COLUMNS, generator=generator) * 100
            tensors[f"{stem}.attn.{part}_proj.weight"] = codes.to(torch.float8_e4m3fn)
            tensors[f"{stem}.attn.{part}_proj.weight_scale"] = torch.tensor(0.25 * 2**number * (1 + layer))
            tensors[f"{stem}.attn.{part}_proj.input_scale"] = torch.tensor(0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "fake", "architectures": ["Fake"], "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Write the checkpoint again, edited."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class Fused(nn.Module):
    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.quantized = dtype is None
        shape = len(PARTS) * ROWS, COLUMNS
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype or torch.float8_e4m3fn), requires_grad=False)
        if self.quantized:
            self.weight_scale = nn.Parameter(torch.empty(len(PARTS)), requires_grad=False)
            self.input_scale = nn.Parameter(torch.full((len(PARTS),), -1.0), requires_grad=False)


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.attn, self.norm = nn.Module(), nn.Module()
        self.attn.qkv_proj = Fused(dtype)
        self.attn._k_scale = torch.tensor(0.5)
        self.norm.weight = nn.Parameter(torch.empty(COLUMNS, dtype=torch.bfloat16), requires_grad=False)


class Model(nn.Module):
    """``fault``: slot 0 only, dropped, doubled, swapped, raises, kernel; or "" for a sound loader."""

    def __init__(self, dtype: torch.dtype | None, stages: tuple[int, int], count: int, fault: str, words: int) -> None:
        super().__init__()
        if words:
            head: Any = nn.Module()
            head.weight = nn.Parameter(torch.empty(words, COLUMNS, dtype=dtype or torch.bfloat16))
            self.lm_head = head
        self.layers = nn.ModuleList(Layer(dtype) if stages[0] <= n < stages[1] else nn.Identity() for n in range(count))
        self.fault = fault

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        if self.fault == "in threads":
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda each: self._load(*each), weights))
        else:
            for name, tensor in weights:
                self._load(name, tensor)

    def _load(self, name: str, tensor: torch.Tensor) -> None:
        if name == "lm_head.weight":
            weight: Any = self.lm_head.weight
            if weight.shape != tensor.shape:
                raise ValueError(f"{name}: found {list(tensor.shape)}")
            weight.data.copy_(tensor)
            return
        _, _, number, *rest = name.split(".")
        layer: Any = self.layers[int(number)]
        if isinstance(layer, nn.Identity):
            return
        if rest[0] == "norm":
            layer.norm.weight.data.copy_(tensor)
            return
        part = PARTS.index(rest[1][0])
        fused = layer.attn.qkv_proj
        if rest[2] == "weight":
            fused.weight.data.narrow(0, part * ROWS, ROWS).copy_(tensor)
        elif hasattr(fused, rest[2]):
            self._scale(getattr(fused, rest[2]).data, part, tensor, rest[2])

    def _scale(self, slots: torch.Tensor, part: int, scale: torch.Tensor, name: str) -> None:
        if self.fault == "raises":
            raise ValueError(f"there is no parameter {name}")
        if name == "weight_scale" and self.fault == "slot 0 only":
            slots[0] = scale
        elif name == "weight_scale" and self.fault == "dropped" and part == 1:
            return
        elif name == "weight_scale" and self.fault == "doubled" and part == 1:
            slots[part] = scale * 2
        elif name == "weight_scale" and self.fault == "swapped":
            slots[(part + 1) % len(PARTS)] = scale
        elif name == "input_scale" and self.fault == "half the input scale":
            slots[part] = scale / 2
        else:
            if scale.numel() != 1:
                raise ValueError(f"{name}: expected one value, found {list(scale.shape)}")
            slots[part].fill_(scale.item())


class FakeEngine(driver.Engine):
    name, package = "Fake", "json"  # a package that every Python has
    fault = ""
    recorded = True

    def start(self) -> str:
        if self.fault == "does not start":
            raise RuntimeError("libcudart.so.12 is missing")
        return "1.0"

    def load(self, folder: Path, dtype: str, weights: driver.Weights | None, *, finish: bool) -> driver.Loaded:
        config = json.loads((folder / "config.json").read_text())
        quantized = "quantization_config" in config
        if self.fault == "unknown version" and quantized:
            driver.spread(torch.ones(5), (4, 4), None)  # stands for a name that the driver looks for in vain
        if self.fault == "unknown model":
            raise ValueError("architecture Fake is not supported")
        self.phase = "building the model"
        words = config.get("text_config", {}).get("vocab_size", 0)
        if self.fault == "needs all words" and words != 3000:
            raise ValueError("a token beyond the vocabulary")
        fault = self.fault if quantized or self.fault == "in threads" else ""
        model = Model(None if quantized else getattr(torch, dtype), self.stage(2), 2, fault, words)
        into: list[driver.Recorder] = []
        with self.watched(model, weights, into):
            model.load_weights(load_file(folder / "model.safetensors").items() if weights is None else weights)
        layers: Iterable[Any] = model.layers if finish and quantized else ()
        for layer in layers:
            if not isinstance(layer, nn.Identity):
                self._prepare(layer.attn.qkv_proj)
        return driver.Loaded(model, into[0] if self.recorded else None)

    def _prepare(self, fused: Any) -> None:
        """One scale for each row, as channel scales have; the largest input scale."""
        if self.fault == "kernel":
            raise RuntimeError("Failed to find a kernel that can implement the FP8 layer")
        rows = fused.weight_scale.data.repeat_interleave(ROWS).reshape(-1, 1)
        fused.weight_scale = nn.Parameter(rows, requires_grad=False)
        fused.input_scale = nn.Parameter(fused.input_scale.data.max(), requires_grad=False)
