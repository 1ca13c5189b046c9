"""Real checkpoints for every test, and ways to break a copy of one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.needed_tools import pytest_runtest_makereport
from tests.support import FIXTURES

__all__ = ["pytest_runtest_makereport"]

# Machines differ and are busy: how long an example takes says nothing.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(params=["llmcompressor-qwen3_5-text", "llmcompressor-qwen3_5-vl", "llmcompressor-qwen3_5-moe"])
def real(request: pytest.FixtureRequest) -> Path:
    """Each checkpoint that llm-compressor wrote. Read only."""
    return FIXTURES / str(request.param)


@pytest.fixture
def text() -> Path:
    """The smallest llm-compressor checkpoint. Read only."""
    return FIXTURES / "llmcompressor-qwen3_5-text"


@pytest.fixture
def vl() -> Path:
    """The vision-language llm-compressor checkpoint. Read only."""
    return FIXTURES / "llmcompressor-qwen3_5-vl"


@pytest.fixture
def copy(tmp_path: Path, text: Path) -> Path:
    """A copy of the smallest checkpoint, to be broken."""
    return Path(shutil.copytree(text, tmp_path / "copy"))


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a fixture by name, to be broken."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))
