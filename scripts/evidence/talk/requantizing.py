"""What requantizing z alone costs in the model that talks, as vLLM 0.20 and newer do it: a Markdown table.

PYTHONPATH=scripts:. .venv/bin/python -m talk.requantizing
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from talk import say, served

FOLDER = say.HELD_BACK.parent / "talk-fp8"
#: By name: the ends of the names of modules that have the weights as served; all others have them as meant.
STEPS: dict[str, tuple[str, ...]] = {
    "none": (),
    "`in_proj_z`": ("in_proj_z",),
    "`in_proj_qkv`, `in_proj_z`": ("in_proj_qkv", "in_proj_z"),
    "all": ("",),
}


def rows() -> Iterator[str]:
    """A line for each step."""
    meant, new = (served.weights(FOLDER, loader) for loader in ("as meant", "vLLM 0.20 and newer"))
    model = served.model(FOLDER, "as meant")
    for name, ends in STEPS.items():
        chosen = {key: new[key] if key.removesuffix(".weight").endswith(ends) else meant[key] for key in meant}
        model.load_state_dict(chosen)
        said = say.ask(model, length=1)
        yield f"| {name} | {said.nats:.5f} | {said.perplexity:.4f} |"


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    print("| as served | nats a byte | perplexity |", "| --- | --- | --- |", sep="\n")
    for each in rows():
        print(each, flush=True)
