"""JSON Schemas of what `--json` prints. A document names its schema: `"schema": "urn:rewrite:inspect:1"`.

The number grows when a field is renamed, removed, or means something else. New fields come without a new number: a
schema is exact for the version of the package that it lies in, so read it from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

Kind = Literal["inspect", "convert", "plan", "part", "verify", "try", "error"]
KINDS: tuple[Kind, ...] = ("inspect", "convert", "plan", "part", "verify", "try", "error")
VERSION = 1


def named(kind: Kind, document: Mapping[str, Any]) -> dict[str, Any]:
    """The document, and before all else the name of its schema."""
    return {"schema": f"urn:rewrite:{kind}:{VERSION}", **document}


def schema(kind: Kind) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the documents of this kind."""
    found: dict[str, Any] = json.loads((files(__name__) / f"{kind}-{VERSION}.json").read_text(encoding="utf-8"))
    return found
