"""The same prompt continued by a checkpoint as engines serve it, before and after a conversion. Called by demo.sh."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from talk import say, served

ROWS = (
    ("original, as vLLM 0.17 to 0.19.1 serves it", "vLLM 0.19.1", False),
    ("original, as vLLM 0.20 and newer serve it", "vLLM 0.20 and newer", False),
    ("OUT, as vLLM 0.17 to 0.19.1 serves it", "vLLM 0.19.1", True),
)


def lines(before: Path, after: Path) -> list[str]:
    """What each of them says, and its perplexity on held-back text."""
    found = [f"A small model that was trained to write ({before}) goes on after: {say.PROMPT.strip()!r}"]
    for title, loader, converted in ROWS:
        said = say.ask(served.model(after if converted else before, loader))
        found.append(f"  {title}: perplexity {said.perplexity:.3f} ({said.nats:.4f} nats a byte)")
        found.append(f"    {said.text!r}")
    return found


def main(before: Path, after: Path) -> None:
    """Print it."""
    warnings.filterwarnings("ignore")
    print("\n".join(lines(before, after)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
