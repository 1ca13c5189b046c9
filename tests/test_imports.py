"""Which folder of the package may import which: what keeps them independent of each other."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "rewrite"


def imports(package: str) -> set[str]:
    """Every module of this project that a package imports, directly or through others."""
    seen: set[str] = set()
    files = (path.relative_to(ROOT).with_suffix("") for path in (PACKAGE / package).rglob("*.py"))
    todo = [".".join(file.parts) for file in files]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        todo += _imported(name)
    return seen


def _imported(name: str) -> Iterable[str]:
    path = ROOT / Path(*name.split("."))
    source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (n for n in [node.module, *names] if n.startswith("rewrite") and _exists(n))
            yield from (node.module for _ in [0] if node.module.split(".")[0] == "torch")
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("rewrite"))


def _exists(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def test_verification_has_eyes_of_its_own() -> None:
    """It imports neither planning nor the reading of scales and dialects, nor what predicts, but for types."""
    closure = {n for n in imports("verification") if n.startswith("rewrite.")}
    closure -= {"rewrite.loaders.outcome", "rewrite.loaders.ranges"}
    forbidden = ("planning", "writing", "inspection", "loaders", "api", "cli", "integrations")
    assert not [name for name in closure if name.split(".")[1] in forbidden]
    assert not closure & {"rewrite.quantization.scales", "rewrite.quantization.model", "rewrite.quantization.fit"}
    assert not [name for name in closure if name.startswith("rewrite.quantization.dialects")]


def test_the_checkpoint_folder_imports_nothing_above_it() -> None:
    """Only itself and the errors."""
    assert {name.split(".")[1] for name in imports("checkpoint") if "." in name} == {"checkpoint", "errors"}


def test_planning_knows_neither_where_bytes_lie_nor_torch() -> None:
    """Pure but for reading scales through the checkpoint."""
    closure = imports("planning")
    assert "rewrite.checkpoint.local" not in closure
    assert not [name for name in closure if name.startswith(("torch", "rewrite.writing", "rewrite.verification"))]


def test_the_report_knows_of_no_storage() -> None:
    """It is handed what was found: it opens nothing, verifies nothing, and does not know who calls it."""
    direct = {name for path in (PACKAGE / "report").glob("*.py") for name in _imported(f"rewrite.report.{path.stem}")}
    known = "errors inspection ledger.fault loaders planning quantization.kv_cache report version wording"
    results = "trying.tried trying.verdict verification.result"
    allowed = tuple(f"rewrite.{name}" for name in [*known.split(), *results.split()])
    assert {name for name in direct if not name.startswith(allowed)} == {"rewrite.checkpoint.local"}  # io_errors
