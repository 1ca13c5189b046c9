"""The engine versions of the matrix: `engines.toml`, read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tomllib


@dataclass(frozen=True)
class Engine:
    """A released engine; `engines.toml` says what the fields mean."""

    name: str
    version: str
    pins: tuple[str, ...]
    serves_tp: bool = False
    generates: bool = False
    boundary: bool = False
    compiled: str | None = None
    variant: str = ""  # names the folder of an engine that is put together in another way
    source: str | None = None  # NAME==VERSION of a package whose source is there, too: its folder is in SOURCE

    @property
    def slug(self) -> str:
        return f"{self.name}-{self.version}{self.variant}"

    @property
    def spec(self) -> str:
        return f"{self.name}=={self.version}"


def _read(path: Path) -> tuple[Engine, ...]:
    tables = tomllib.loads(path.read_text())
    return tuple(
        Engine(name, version, **{**entry, "pins": tuple(entry["pins"])})
        for name, versions in tables.items()
        for version, entry in versions.items()
    )


ENGINES = _read(Path(__file__).with_name("engines.toml"))


def find_engine(spec: str) -> Engine:
    """The engine that `NAME==VERSION` means; KeyError names the known ones."""
    known = {each.spec: each for each in ENGINES}
    if spec not in known:
        raise KeyError(f"unknown engine {spec!r}; known: {', '.join(known)}")
    return known[spec]
