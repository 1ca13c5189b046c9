"""`python -m benchmark.unsynced convert ...`: rewrite without its syncs, to tell its own work from the disk's."""

from __future__ import annotations

import os

from rewrite.cli import main

if __name__ == "__main__":
    os.fsync = lambda fd: None
    main()
