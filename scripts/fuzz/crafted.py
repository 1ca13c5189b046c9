"""Crafted cases, the same every time: ``-m fuzz.crafted [FIRST COUNT]``. Prints how they ended; stops at a find."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from tests.crafted_cases import crafted, judge

first, count = [int(argument) for argument in sys.argv[1:3]] or [0, 10_000]
outcomes: Counter[str] = Counter()
slowest = 0.0
with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
    for seed in range(first, first + count):
        directory = Path(memory) / "case"
        crafted(seed, directory)
        started = time.perf_counter()
        try:
            outcomes[judge(directory)] += 1
        except BaseException:
            print(f"seed {seed}", file=sys.stderr)
            raise
        slowest = max(slowest, time.perf_counter() - started)
        shutil.rmtree(directory)
print(dict(outcomes), f"slowest {slowest:.2f} s, at most {getrusage(RUSAGE_SELF).ru_maxrss // 1024} MB")
