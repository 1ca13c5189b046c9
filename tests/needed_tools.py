"""Tests that need a program of the machine are skipped without it, but fail where CI is set: a skip is silent there.

scripts/tools.sh installs these programs.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

#: Markers of such tests. Those of a GPU and of an S3 server may be skipped anywhere.
MARKERS = ("browser", "filesystems")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip becomes a failure."""
    report = yield
    markers = [name for name in MARKERS if item.get_closest_marker(name)]
    if markers and os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}. CI is set, so no test of {markers[0]!r} may be: run scripts/tools.sh"
    return report
