"""`python scripts/digests.py`: what every conversion of every fixture writes, as a table of digests.

Run it with two versions of the package (PYTHONPATH) and compare the tables: a change that must not change outputs
changes no line. The manifest is left out of the digests. A refusal is a line with its message.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import rewrite

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"


def main() -> None:
    """Print a line for each fixture, profile and selection of groups."""
    for fixture in sorted(path for path in FIXTURES.iterdir() if path.is_dir()):
        for profile in rewrite.PROFILES:
            for selection in rewrite.SELECTIONS:
                print(f"{fixture.name:28} {profile:9} {selection:4} {_outcome(fixture, profile, selection)}")


def _outcome(fixture: Path, profile: str, selection: rewrite.Selection) -> str:
    with tempfile.TemporaryDirectory() as work:
        try:
            rewrite.convert(fixture, Path(work) / "out", profile=profile, selection=selection)
        except rewrite.Refused as refusal:
            return f"refused: {refusal.what}"
        return _digest(Path(work) / "out")


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "rewrite_manifest.json"):
        digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
