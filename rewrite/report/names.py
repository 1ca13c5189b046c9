"""Names for paths: a report is published, and says nothing of the machine that it was made on."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Names:
    """Paths, and what stands for each."""

    of: Mapping[str, str]

    def hide(self, text: str) -> str:
        """``text`` with names where it has one of the paths, as it was given or absolute."""
        paths = {form: name for path, name in self.of.items() for form in _forms(path)}
        for path in sorted(paths, key=len, reverse=True):
            text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", lambda _, name=paths[path]: name, text)  # type: ignore[misc]
        return text


def _forms(path: str) -> set[str]:
    """Only what has a slash is a path; other words may mean anything."""
    forms = (
        {path.rstrip("/")} if "://" in path else {path.rstrip("/"), str(Path(path).absolute()), os.path.realpath(path)}
    )
    return {form for form in forms if "/" in form.strip("/") or (form.startswith("/") and len(form) > 1)}
