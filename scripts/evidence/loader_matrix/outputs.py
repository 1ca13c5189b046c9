"""Outputs of NVFP4 layers through vLLM's own emulation on CPU, before and after a repair: a Markdown table.

    scripts/evidence.sh outputs [--record]

`--record` writes them to tests/nvfp4_outputs.json. The figures are the worst of all layers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engines.driver import Unavailable
from engines.known import find_engine

from loader_matrix import cases, table
from loader_matrix.matrix import Runner, Selection

ENGINE = find_engine("vllm==0.32.0")
FIXTURES = [name for name in cases.NVFP4_FIXTURES if not name.startswith("modelopt")]
RECORD = cases.REPOSITORY / "tests" / "nvfp4_outputs.json"


def run() -> list[dict[str, Any]]:
    """A row for each fixture and profile: errors by layer and partition."""
    selection = Selection((ENGINE,), tuple(FIXTURES), cases.NVFP4_PROFILES, extras=False)
    loads = selection.loads()
    rows = []
    for (_, fixture, profile, _), results in Runner(selection, 1).run("outputs_vllm", loads).items():
        if isinstance(results, Unavailable) or "outputs" not in results[0]:
            raise SystemExit(f"{fixture}, {profile}: {results}")
        rows.append({"fixture": fixture, "profile": profile, "errors": worst(results[0]["outputs"])})
    return rows


def worst(outputs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By the last name of the layer, over the layers of the model; four digits."""
    found: dict[str, dict[str, float]] = {}
    for name, errors in outputs.items():
        own = found.setdefault(name.rpartition(".")[2], {})
        for part, error in errors.items():
            own[part] = max(own.get(part, 0.0), float(f"{error:.3e}"))
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line for each layer of each row."""
    lines: list[tuple[str, ...]] = []
    for row in rows:
        for layer, errors in row["errors"].items():
            figures = ", ".join(f"{part} {table.figure(error)}" for part, error in errors.items())
            lines.append((row["fixture"], layer, row["profile"], figures))
    lines.sort(key=lambda line: (FIXTURES.index(line[0]), line[1], cases.NVFP4_PROFILES.index(line[2])))
    return table.markdown(("fixture", "layer", "profile", "outputs off by"), lines)


def main(words: list[str]) -> None:
    """Run, or with `--readme` only print what is recorded."""
    rows = json.loads(RECORD.read_text()) if words == ["--readme"] else run()
    if words == ["--record"]:
        RECORD.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n")
    print(markdown(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
