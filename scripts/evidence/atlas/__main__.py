"""Extracts what engines fuse from their own source: scripts/evidence.sh atlas [--check | --add SPEC].

Writes rewrite/quantization/atlas.json and rewrite/loaders/ATLAS.md. ``FOLDER`` has a folder ``ENGINE-VERSION`` with the
Python files of each engine, as the loader matrix installs them; no engine is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from atlas.engines import ENGINES
from atlas.page import page
from atlas.record import lines, record
from atlas.release import changes, unpack

ROOT = Path(__file__).resolve().parents[3]
DATA = ROOT / "rewrite" / "quantization" / "atlas.json"
NOT_SEEN = Path(__file__).with_name("not_seen.json")
PAGE = ROOT / "rewrite" / "loaders" / "ATLAS.md"
TRANSFORMERS = "transformers-5.24.0"


def main() -> int:
    parser = argparse.ArgumentParser(prog="atlas", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packages", type=Path, default=ROOT / ".cache" / "loaders", help="where the engines lie")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the data differs")
    parser.add_argument("--page", action="store_true", help="write the page only, from the data")
    parser.add_argument(
        "--add", metavar="NAME==VERSION", help="a release: gets its wheel; prints lines for CHANGELOG.md"
    )
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(DATA.read_text()), json.loads(NOT_SEEN.read_text())))
        return 0
    versions = list(json.loads(DATA.read_text())["families"])
    if options.add:
        name, _, version = options.add.partition("==")
        (engine,) = (each for each in ENGINES if each.lower() == name.lower())
        unpack(options.add, options.packages / f"{name.lower()}-{version}")
        before = [each for each in versions if each.startswith(f"{engine} ")][-1]
        versions = list(dict.fromkeys([*versions, f"{engine} {version}"]))
    packages = [
        (name, version, options.packages / f"{name.lower()}-{version}") for name, version in map(str.split, versions)
    ]
    missing = [str(folder) for *_, folder in packages if not folder.is_dir()]
    if missing:
        print(
            f"no engine lies in {', '.join(missing)}: scripts/evidence.sh loader_matrix installs them", file=sys.stderr
        )
        return 2
    data = record(packages, options.packages / TRANSFORMERS)
    if options.check:
        return int(lines(data) != DATA.read_text())
    DATA.write_text(lines(data))
    NOT_SEEN.write_text(json.dumps(data["not_seen"], indent=1) + "\n")
    PAGE.write_text(page(data, data["not_seen"]))
    for release, families in data["families"].items():
        print(f"{release}: {len(families)} families, {len(data['not_seen'][release])} not seen in full")
    if options.add:
        print("\n".join(changes(data, before, f"{engine} {version}")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
