"""What tests need of a machine: it is installed where that is possible, and its absence is seen where CI is set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

BASICS = ("bash", "mktemp", "rm", "tail")
SKIPS = """
import pytest

@pytest.mark.{marker}
def test_it():
    pytest.skip("there is none here")
"""


@pytest.mark.parametrize(
    ("marker", "ci", "passes"),
    [
        ("browser", "", True),
        ("browser", "true", False),
        ("filesystems", "true", False),
        ("gpu", "true", True),
        ("s3_server", "true", True),
    ],
)
def test_a_missing_tool_is_a_failure_where_ci_is_set(marker: str, ci: str, passes: bool, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SKIPS.format(marker=marker))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.needed_tools", "-c", ROOT / "pyproject.toml", tmp_path],
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "-p no:cacheprovider"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == passes, done.stdout
    assert "there is none here" in done.stdout
    assert ("1 skipped" in done.stdout) == passes


def tools(folder: Path, user: int, *there: str, apt: str = "exit 0") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run scripts/tools.sh where ``there`` are all programs; what it did, and what apt-get was asked."""
    asked = folder / "asked"
    asked.touch()
    for name in BASICS:
        found = next(path for path in (Path("/usr/bin", name), Path("/bin", name)) if path.exists())
        (folder / name).symlink_to(found)
    scripts = {"id": f"echo {user}", "apt-get": f'echo "$*" >> {asked}; {apt}', **dict.fromkeys(there, "exit 0")}
    for name, text in scripts.items():
        (folder / name).write_text(f"#!{folder}/bash\n{text}\n")
        (folder / name).chmod(0o755)
    # the script looks in /usr/sbin too: not here
    text = (ROOT / "scripts" / "tools.sh").read_text().replace(":/usr/sbin:/sbin", "")
    done = subprocess.run(
        [folder / "bash", "-c", text], env={"PATH": str(folder)}, capture_output=True, text=True, check=False
    )
    return done, asked.read_text()


def test_what_is_missing_is_installed(tmp_path: Path) -> None:
    done, asked = tools(tmp_path, 0, "mkfs.xfs")
    assert done.returncode == 0, done.stderr
    update, install = asked.splitlines()
    assert update.startswith("update")
    assert install.endswith("-recommends chromium btrfs-progs")


def test_nothing_is_installed_twice(tmp_path: Path) -> None:
    done, asked = tools(tmp_path, 0, "google-chrome", "mkfs.xfs", "mkfs.btrfs")
    assert (done.returncode, done.stderr, asked) == (0, "", "")


def test_without_root_it_says_what_is_missing(tmp_path: Path) -> None:
    done, asked = tools(tmp_path, 1000, "chromium", "mkfs.btrfs")
    assert (done.returncode, asked) == (0, "")
    assert "Not installed: xfsprogs" in done.stderr


def test_an_installation_that_fails_says_why(tmp_path: Path) -> None:
    done, _ = tools(tmp_path, 0, apt='echo "Unable to locate package"; exit 100')
    assert done.returncode == 1
    assert "Unable to locate package" in done.stderr
