"""`convert --verify`: an output that is verified before anybody can see it, or is not published."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import rewrite
from rewrite.errors import NotVerified
from rewrite.loaders.asked import Asked


class CheckBefore:
    """Verifies what is about to be published. Where torch is not installed outputs are not multiplied, and the result
    says so."""

    def __init__(self, out: str, asked: Asked, platform: str, workers: int) -> None:
        self._out, self._asked, self._platform, self._workers = out, asked, platform, workers
        self._found: rewrite.Verification | None = None

    def __call__(self, source: rewrite.Storage, staged: rewrite.Storage) -> rewrite.Verification:
        """Raises :class:`NotVerified`."""
        found = rewrite.verify(
            source, staged, engines=None if self._asked.every else self._asked.engines, platform=self._platform,
            weights_only=find_spec("torch") is None, workers=self._workers,
        )  # fmt: skip
        self._found = replace(found, out=self._out)
        if not found.ok:
            problems = [problem.strip() for check in found.checks for problem in check.problems]
            served = "name the engines that serve it with --for, or another --profile"
            raise NotVerified(
                f"The output was not published: not verified ({', '.join(found.failed)})", where=self._out,
                expected="a conversion that verify proves", found=problems[0],
                hint=served if found.bytes_ok else "report this: the conversion is not what it promises",
            )  # fmt: skip
        return self._found

    def result(self, source: str) -> rewrite.Verification:
        """What was found; found now where an earlier run had published this very output."""
        return self._found or self(rewrite.open_storage(source), rewrite.open_storage(self._out))
