"""Outputs of NVFP4 layers through vLLM's own emulation on CPU, before and after a repair: a Markdown table.

    scripts/evidence.sh outputs [--record]

`--record` writes them to tests/nvfp4_outputs.json. The figures are the worst of all layers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import records
from engines.driver import Unavailable
from engines.known import find_engine

from loader_matrix import cases, table
from loader_matrix.matrix import Selection, run_driver

ENGINE = find_engine("vllm==0.32.0")
FIXTURES = [name for name in cases.NVFP4_FIXTURES if not name.startswith("modelopt")]


@dataclass(frozen=True)
class Cell:
    """By layer and partition, how far the outputs are off."""

    fixture: str
    profile: str
    outcome: str
    errors: dict[str, dict[str, float]]

    @property
    def key(self) -> tuple[str, str]:
        return (self.fixture, self.profile)


def _order(cell: Cell) -> tuple[int, int]:
    return FIXTURES.index(cell.fixture), cases.NVFP4_PROFILES.index(cell.profile)


BOOK = records.Book(cases.REPOSITORY / "tests" / "nvfp4_outputs.json", 1, Cell, _order)


def run() -> list[Cell]:
    """A cell for each fixture and profile: errors by layer and partition."""
    selection = Selection((ENGINE,), tuple(FIXTURES), cases.NVFP4_PROFILES, extras=False)
    rows = []
    for (_, fixture, profile, _), results in run_driver("outputs_vllm", selection.loads()).items():
        if isinstance(results, Unavailable) or "outputs" not in results[0]:
            raise SystemExit(f"{fixture}, {profile}: {results}")
        rows.append(Cell(fixture, profile, "runs", worst(results[0]["outputs"])))
    return rows


def worst(outputs: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By the last name of the layer, over the layers of the model; four digits."""
    found: dict[str, dict[str, float]] = {}
    for name, errors in outputs.items():
        own = found.setdefault(name.rpartition(".")[2], {})
        for part, error in errors.items():
            own[part] = max(own.get(part, 0.0), float(f"{error:.3e}"))
    return found


def markdown(cells: list[Cell]) -> str:
    """A line for each layer of each cell."""
    lines: list[tuple[str, ...]] = []
    for cell in cells:
        for layer, errors in cell.errors.items():
            figures = ", ".join(f"{part} {table.figure(error)}" for part, error in errors.items())
            lines.append((cell.fixture, layer, cell.profile, figures))
    lines.sort(key=lambda line: (FIXTURES.index(line[0]), line[1], cases.NVFP4_PROFILES.index(line[2])))
    return records.markdown(("fixture", "layer", "profile", "outputs off by"), lines)


def main(words: list[str]) -> None:
    """Run, or with `--readme` only print what is recorded."""
    cells = BOOK.read().cells if words == ["--readme"] else run()
    if words == ["--record"]:
        BOOK.add(cells, anew=True)
    print(markdown(cells))


if __name__ == "__main__":
    main(sys.argv[1:])
