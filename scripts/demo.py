"""What a conversion changed, in a few lines, and transformers' logits before and after. Called by demo.sh."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open


def main(before: Path, after: Path) -> None:
    show_tensors(read(before), read(after))
    show_config(before, after)
    show_logits(before, after)


def read(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, by the stock reader."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    return tensors


def show_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    changed = [name for name in before if not same(before[name], after[name])]
    print("Tensors that changed (every row of the new scale carries the value of the old one):")
    for name in changed:
        assert (after[name] == before[name]).all()
        print(f"  {name}  {list(before[name].shape)} -> {list(after[name].shape)}")
    rest = f"{len(before) - len(changed)} of {len(before)} tensors"
    print(f"Byte for byte the same: the other {rest}, all weights among them.\n")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Shape, dtype and bits."""
    return one.shape == other.shape and one.dtype == other.dtype and bits(one).equal(bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def show_config(before: Path, after: Path) -> None:
    old, new = (
        json.loads((d / "config.json").read_text())["quantization_config"]["config_groups"] for d in (before, after)
    )
    print("config.json, the config groups:")
    for name, group in new.items():
        news = "  (new)" if name not in old else ""
        print(f"  {name}: {group['weights']['strategy']:<7} {', '.join(group['targets'])}{news}")


def show_logits(before: Path, after: Path) -> None:
    one, other = logits(before), logits(after)
    difference = (one.float() - other.float()).abs().max().item()
    print(f"\ntransformers' logits before and after: largest difference {difference} over {one.numel():,} values.")
    if not torch.equal(one, other):
        sys.exit("The logits differ: this is a bug of rewrite.")


def logits(directory: Path) -> torch.Tensor:
    """[1, 30, vocabulary] for a fixed prompt. transformers loads the modules one by one: it is not affected."""
    import transformers  # slow, so after the first lines are on the screen

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    config: Any = transformers.AutoConfig.from_pretrained(directory)
    # Several progress bars; an error is raised, not printed.
    with contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        model = getattr(transformers, config.architectures[0]).from_pretrained(directory, dtype=torch.bfloat16)
        found: torch.Tensor = model(input_ids=torch.arange(10, 40)[None]).logits
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
