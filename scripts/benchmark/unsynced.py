"""`python -m benchmark.unsynced convert ...`: rewrite without its syncs, to tell its own work from the disk's.

Says when it began, like the other contestants in Python.
"""

from __future__ import annotations

import os
import time

from rewrite.cli.commands import main

if __name__ == "__main__":
    print(time.monotonic(), flush=True)
    os.fsync = lambda fd: None
    main()
