"""A verification as an in-toto Statement (https://in-toto.io/Statement/v1), for programs that sign such.

The subjects are all files of OUT with their SHA-256, of the very bytes that were compared. The predicate says what was
checked, how, and by which versions. It has no times and no paths: the same run gives the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from rewrite.environment import versions
from rewrite.errors import UsageError
from rewrite.verification.result import IN, OUT, Verification
from rewrite.version import __version__

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "urn:rewrite:verification:1"


def statement(verification: Verification) -> dict[str, Any]:
    """The Statement of a verification that holds and noted the digests; raises :class:`UsageError` for another one."""
    if not verification.ok:
        raise UsageError("OUT is not verified: nothing is attested", where=verification.out)
    if not verification.digests:
        raise UsageError("There are no digests to attest", hint="leave --quick and --no-digest out")
    subjects = [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(verification.digests.items())]
    return {"_type": STATEMENT, "subject": subjects, "predicateType": PREDICATE, "predicate": _predicate(verification)}


def _predicate(verification: Verification) -> dict[str, Any]:
    return {
        "verifier": {"name": "rewrite", "version": __version__},
        "environment": versions(),
        "in": _last(verification.source),
        "out": _last(verification.out),
        "ok": verification.ok,
        "settings": asdict(verification.settings),
        "checks": [{"name": c.name, "verdict": c.verdict, "summary": c.summary} for c in verification.checks],
        "notChecked": list(verification.not_checked),
        "loaders": [
            {
                "loader": row.engine.name,
                "versions": row.engine.versions,
                "before": row.outcomes[IN].kind,
                "after": row.outcomes[OUT].kind,
            }
            for row in verification.loaders
        ],
    }


def _last(path: str) -> str:
    """A folder's own name, without where it lies."""
    return PurePosixPath(path).name


def dump(verification: Verification) -> str:
    """The Statement as JSON."""
    return json.dumps(statement(verification), indent=2, sort_keys=True) + "\n"
