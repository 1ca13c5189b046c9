"""`python -m benchmark.planner IN`: seconds of opening and of planning a checkpoint, without the process around it."""

from __future__ import annotations

import json
import sys
import time

import rewrite

if __name__ == "__main__":
    started = time.monotonic()
    checkpoint = rewrite.open_checkpoint(sys.argv[1])
    opened = time.monotonic()
    plan = rewrite.make_plan(checkpoint)
    planned = time.monotonic()
    print(
        json.dumps(
            {
                "open": opened - started,
                "plan": planned - opened,
                "tensors": len(checkpoint.tensors),
                "shards": len(checkpoint.shards),
                "groups": len(plan.manifest.groups),
            }
        )
    )
