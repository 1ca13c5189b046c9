"""Where a report goes: what its name says it is, and its files. The packages that draw it are imported here alone."""

from __future__ import annotations

import importlib
from pathlib import Path

from rewrite.checkpoint.local import io_errors
from rewrite.errors import StorageError, UsageError
from rewrite.report.page import Page

SUFFIXES = (".html", ".md")


def check(path: Path) -> None:
    """Before any work: whether a report can be made and put there.

    Raises :class:`UsageError` for a name that says no form and where packages are missing, and :class:`StorageError`
    where there is no such folder.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError("A report is a page or Markdown", expected="FILE.html or FILE.md", found=path.name)
    for name in ("matplotlib", "jinja2"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UsageError(
                f"A report needs the package `{name}`", found=path.name, hint="pip install 'rewrite[report]'"
            ) from None
    if not path.absolute().parent.is_dir():
        raise StorageError("There is no such folder", where=str(path.parent), hint="make it first")


def write(report: Page, path: Path) -> None:
    """The report, in place of one that may be there; images beside Markdown first."""
    from rewrite.report import render

    if path.suffix == ".html":
        text = render.html(report)
    else:
        text, images = render.markdown(report, path.stem)
        for name, image in images.items():
            with io_errors(path.with_name(name)):
                path.with_name(name).write_bytes(image)
    with io_errors(path):
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
