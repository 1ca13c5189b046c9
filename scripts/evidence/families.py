"""Writes small FP8 checkpoints of families that no table of rewrite names, by their real producers.

    scripts/evidence.sh families FOLDER [NAME ...]

`try_families` judges what comes out.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from producers.models import base_model
from producers.produce import produce


def _llmcompressor(*ignore: str) -> tuple[str, str, dict[str, Any]]:
    return "llmcompressor", "oneshot", {"targets": "Linear", "scheme": "FP8", "ignore": ["lm_head", *ignore]}


_MODELOPT = ("modelopt", "export", {"config": "FP8_DEFAULT_CFG", "off": ["*lm_head*", "*gate.*", "*router*"]})
_ROUTER = "re:.*mlp.gate$"
#: The names are those of producers/models.py, without ``small-``.
TABLE = {
    "granite": _llmcompressor(),
    "gemma3": _llmcompressor(),
    "qwen3_vl": _llmcompressor("re:.*visual.*"),
    "glm4_moe": _llmcompressor(_ROUTER),
    "mixtral": _MODELOPT,
}


def main() -> None:
    """Write those that are named, or all."""
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(TABLE)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="family-") as scratch:
            base = base_model(f"small-{name}", Path(scratch), spread_mlp=name in ("glm4_moe", "mixtral"))
            producer, call, recipe = TABLE[name]
            produce(producer, call, f"small-{name}", base, folder / name, recipe)
        print(f"{name}: {sorted(path.name for path in (folder / name).iterdir())}")


if __name__ == "__main__":
    main()
