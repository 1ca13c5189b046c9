"""Of what no loader was run with, inspect says so: never that all is well."""

from __future__ import annotations

from pathlib import Path

import pytest

import rewrite
from rewrite import Refused, Selection
from tests.zoo.rebuild import names, rebuild

UNKNOWN = [name for name in names() if name.startswith(("torchao-", "llmc-mxfp8", "autoround-int8", "autoround-w4a16"))]


@pytest.mark.parametrize("selection", ["qkvz", "all"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_no_loader_is_said_to_be_right(name: str, selection: Selection, tmp_path: Path) -> None:
    """MXFP8, INT8, INT4, and the dialects of torchao, AutoRound, GPTQ and AWQ."""
    inspection = rewrite.inspect_checkpoint(rebuild(name, tmp_path / "IN"), selection=selection)
    if inspection.groups or inspection.dialect not in ("compressed-tensors", "none"):
        assert "exact" not in {row.as_is.kind for row in inspection.rows}


@pytest.mark.parametrize("name", [name for name in UNKNOWN if name.startswith(("torchao-", "autoround-w4a16-own"))])
def test_dialects_that_are_not_read_are_refused(name: str, tmp_path: Path) -> None:
    """A copy would say that there was nothing to do."""
    source = rebuild(name, tmp_path / "IN")
    for profile in rewrite.PROFILES:
        with pytest.raises(Refused, match="cannot be converted"):
            rewrite.convert(source, tmp_path / "out", profile=profile)


def test_negative_scales_of_integers_are_no_fault(tmp_path: Path) -> None:
    """AutoRound writes them on purpose."""
    (name,) = [name for name in names() if name.startswith("autoround-int8")][:1]
    assert rewrite.inspect_checkpoint(rebuild(name, tmp_path / "IN")).findings == ()
