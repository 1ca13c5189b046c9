"""``python -m tests.zoo [NAME...]``: write ``outcomes.json`` anew, and print what must not be.

``--keep`` leaves the table alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tests.zoo.rebuild import names, rebuild
from tests.zoo.run import outcomes
from tests.zoo.test_zoo import OUTCOMES


def run(name: str) -> tuple[str, dict[str, Any], list[str]]:
    """One entry, in a scratch folder."""
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        return name, *outcomes(rebuild(name, Path(scratch) / "IN"), Path(scratch))


def main() -> int:
    """Exit code 1 when something must not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--keep", action="store_true", help="do not write outcomes.json")
    parser.add_argument("--missing", action="store_true", help="only entries that have no outcomes yet")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    table = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else {}
    chosen = arguments.name or [name for name in names() if not (arguments.missing and name in table)]
    bad = 0
    with ProcessPoolExecutor(arguments.workers) as pool:
        for name, found, faults in pool.map(run, chosen):
            table[name] = found
            bad += bool(faults)
            print(f"{name}: {len(faults)} fault(s)", *faults, sep="\n  ", flush=True)
    if not arguments.keep:
        kept = {name: table[name] for name in names() if name in table}
        OUTCOMES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
