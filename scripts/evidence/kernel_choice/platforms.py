"""The platforms that an engine is told it runs on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Platform:
    """A card, or a CPU. ``capability`` is what torch says of the card; None: there is no card."""

    name: str
    capability: tuple[int, int] | None
    rocm: bool = False
    flashinfer: bool = False  # whether vLLM finds FlashInfer, which its wheels for CUDA ask for

    @property
    def architecture(self) -> str:
        """``sm100`` of ``sm100+flashinfer``."""
        return self.name.partition("+")[0]


_CUDA = {"sm80": (8, 0), "sm89": (8, 9), "sm90": (9, 0), "sm100": (10, 0), "sm120": (12, 0)}
_ROCM = {"gfx942": (9, 4), "gfx950": (9, 5)}

PLATFORMS = {
    each.name: each
    for each in (
        *(Platform(name, capability) for name, capability in _CUDA.items()),
        *(Platform(f"{name}+flashinfer", _CUDA[name], flashinfer=True) for name in ("sm90", "sm100", "sm120")),
        *(Platform(name, capability, rocm=True) for name, capability in _ROCM.items()),
        Platform("cpu", None),
    )
}


def platforms(engine: str, version: str) -> tuple[Platform, ...]:
    """Those that an engine is run with. vLLM looks for FlashInfer when it chooses these kernels, SGLang needs it. vLLM
    runs Qwen3.5 on CPU from 0.32 on. SGLang needs a build of its own for CPUs, which was not run."""
    if engine == "transformers":
        return tuple(each for each in PLATFORMS.values() if not each.flashinfer)
    names = [name for name in PLATFORMS if name != "cpu"]
    if engine == "vllm":
        return tuple(PLATFORMS[name] for name in (*names, *(["cpu"] if version == "0.32.0" else [])))
    return tuple(PLATFORMS[name] for name in names if not PLATFORMS[name].flashinfer)
