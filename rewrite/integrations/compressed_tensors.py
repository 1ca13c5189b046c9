"""The expansion of ``convert --profile exact`` as a ``Converter`` of compressed-tensors' ``convert_checkpoint``.

For pipelines that chain it with other converters (dequantizers, re-quantizers). The rewritten tensors have the same
bytes as those of ``convert``; what else happens to the checkpoint is up to ``convert_checkpoint``.
"""

from __future__ import annotations

import os

import torch
from compressed_tensors.quantization import QuantizationConfig

from rewrite.checkpoint.checkpoint import read_checkpoint
from rewrite.checkpoint.local import LocalDirectory
from rewrite.errors import CheckpointError
from rewrite.planning.planner import plan_changes
from rewrite.planning.profiles.base import affected_groups, kv_scales, modules_by_target
from rewrite.quantization.dialects.compressed_tensors import CompressedTensors
from rewrite.quantization.groups import Selection
from rewrite.quantization.model import interpret
from rewrite.quantization.scheme import Layers


class ExplicitScales:
    """One scale for every row of the fused groups of ``source``.

    Raises :class:`rewrite.errors.Refused` for a checkpoint that ``convert`` refuses. It implements
    ``compressed_tensors.entrypoints.convert.Converter`` (compressed-tensors 0.19 and later).
    """

    def __init__(self, source: str | os.PathLike[str], *, selection: Selection | None = None) -> None:
        model = interpret(read_checkpoint(LocalDirectory(source)))
        selection = selection or model.groups.default
        plan_changes(model, "exact", selection)  # refuses what convert refuses
        affected = affected_groups(model, selection)
        modules = [module for _, modules in affected for module in modules]
        self._layers: Layers = model.layers
        # convert_checkpoint can only write compressed-tensors: another dialect is restated in any case.
        restated = bool(model.dialect.value) and not isinstance(model.dialect, CompressedTensors)
        self._restated = model.dialect.as_compressed_tensors(model.layers) if affected or restated else None
        self._names = {old: str(new.name) for old, new in kv_scales(model).items()} if restated else {}
        self._targets = modules_by_target(affected)
        self._rows = {f"{m.name}.weight_scale": tuple(p.rows for p in m.partitions) for m in modules}

    def process(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of a file with the shared scales expanded: ``()``, ``[1]`` or ``[P]`` becomes ``[N, 1]``.

        Scales of the KV cache under ModelOpt's names get compressed-tensors' names, and shape ``[1]``.
        """
        return dict(self._processed(name, tensor) for name, tensor in tensors.items())

    def validate(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As :meth:`process`, which works on meta tensors."""
        return self.process(tensors)

    def update_config(self, config: QuantizationConfig | None) -> QuantizationConfig | None:
        """The config with a channel group. Without a compressed-tensors config, the checkpoint's own is restated."""
        if self._restated is None:
            return config
        restated: CompressedTensors = (
            self._restated if config is None else CompressedTensors(config.model_dump(mode="json"))
        )
        if self._rows:
            restated = restated.with_channel_scales(self._targets, self._layers)
        return QuantizationConfig.model_validate(restated.value)

    def update_model_config(self, model_config: dict[str, object]) -> dict[str, object]:
        """Nothing outside ``quantization_config`` changes."""
        return model_config

    def get_dependencies(self, weight_name: str) -> set[str]:
        """None: a scale is expanded without looking at its weight."""
        return set()

    def _processed(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        if name in self._names:
            return self._names[name], tensor.reshape(1)
        return name, self._expand(name, tensor) if name in self._rows else tensor

    def _expand(self, name: str, scale: torch.Tensor) -> torch.Tensor:
        rows = self._rows[name]
        values = scale.reshape(-1)
        if values.numel() not in (1, len(rows)):
            raise CheckpointError(
                "A scale is not the one that was planned on", where=name, expected=f"1 or {len(rows)} values",
                found=list(scale.shape),
            )  # fmt: skip
        each = zip(values.expand(len(rows)), rows, strict=True)
        return torch.cat([value.expand(count) for value, count in each]).reshape(-1, 1)
