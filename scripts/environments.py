"""Makes the Python environments of the scripts from pinned versions: once, and again when the pins change.

    python3 scripts/environments.py project      .venv: the project, with what its tests, its fuzzer and the lint need
    python3 scripts/environments.py fixtures     what `scripts/evidence.sh fixtures` needs
    python3 scripts/environments.py judge        what `scripts/evidence.sh judge` needs: lm-evaluation-harness

Prints the path of the environment's Python. The loader matrix makes its environments with the same functions.

Runs on the interpreter that the environment is to have, before anything is installed: it needs nothing but pip. A
folder's `.stamp` says which pins and which Python it was made from; it is written last, so that an installation that
was interrupted starts again.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
EXTRAS = "test,lint,fuzz,dask,s3,report"
_PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")
_DOWNLOAD = ("-m", "pip", "download", *_PIP[3:], "--no-deps", "--no-binary")
# For complete lists of pins. No resolver: it could replace torch, or add gigabytes of GPU libraries. Wheels only, but
# where a list has packages that are published as source alone: building a package runs its code.
SOURCES_TOO = ("--no-deps",)
_AS_LISTED = (*SOURCES_TOO, "--only-binary", ":all:")


class Failed(Exception):
    """An environment can't be made; says what was tried, and all that was printed."""

    def __init__(self, purpose: str, output: str) -> None:
        super().__init__(f"{purpose}: {output.strip() or 'no message'}")
        self.purpose = purpose
        #: The last line says why; what comes before are warnings.
        self.reason = (output.strip() or "no message").splitlines()[-1].strip()


def read_pins(path: Path) -> list[str]:
    """The lines `NAME==VERSION` of a file, without its comments."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def project() -> Path:
    """The Python of .venv. Only this one is resolved: the pins hold, but on another Python than 3.11, or where torch is
    a build for GPUs, packages may come along that are not among them."""
    folder, constraints = ROOT / ".venv", SCRIPTS / "constraints.txt"
    pins = read_pins(constraints)
    stamp = _stamp([*pins, (ROOT / "pyproject.toml").read_text()])
    if _is_ready(folder, stamp):
        return _python(folder)
    print("Setting up .venv (once; the download is mostly torch) ...", file=sys.stderr)
    if not _has_this_python(folder):
        _new_venv(folder)
    python = _python(folder)
    # torch first and by its exact version: a range lets pip take a build with gigabytes of GPU libraries.
    _checked([python, *_PIP, *(pin for pin in pins if pin.startswith("torch=="))], "installing torch")
    _checked([python, *_PIP, "--constraint", constraints, "--editable", f"{ROOT}[{EXTRAS}]"], "installing the project")
    _finish(folder, stamp)
    return python


def fixtures() -> Path:
    """The Python with llm-compressor and ModelOpt."""
    pins = read_pins(SCRIPTS / "evidence" / "fixtures" / "pins.txt")
    return exact(ROOT / ".cache" / "fixtures-venv", pins, ("-m", "pip", "check"))


def judge() -> Path:
    """The Python with lm-evaluation-harness, transformers and compressed-tensors."""
    pins = read_pins(SCRIPTS / "evidence" / "talk" / "lm_eval.txt")
    proof = ("-c", "import lm_eval.models.huggingface")
    return exact(ROOT / ".cache" / "judge-venv", pins, proof, how=SOURCES_TOO)  # sqlitedict, word2number: no wheels


def exact(folder: Path, pins: Sequence[str], proof: Sequence[str], *, how: Sequence[str] = _AS_LISTED) -> Path:
    """The Python of an environment with these packages and no others; `proof` are arguments for it that must succeed
    before the environment counts as ready."""
    stamp, python = _stamp(pins), _python(folder)
    if _is_ready(folder, stamp):
        return python
    print(f"Installing {len(pins)} packages into {folder.relative_to(ROOT)} (once) ...", file=sys.stderr)
    _new_venv(folder)
    _checked([python, *_PIP, *how, *pins], f"installing into {folder.name}")
    _checked([python, *proof], f"checking {folder.name}")
    _finish(folder, stamp)
    return python


def overlay(folder: Path, python: Path, pins: Sequence[str], *, how: Sequence[str] = _AS_LISTED) -> Path:
    """A folder with these packages and no others, for the PYTHONPATH of `python`: it shares that one's packages."""
    stamp = _stamp(pins)
    if not _is_ready(folder, stamp):
        print(f"Installing {pins[0]} (once) ...", file=sys.stderr)
        with _made_anew(folder, stamp) as partial:
            _checked([python, *_PIP, *how, "--target", partial, *pins], f"installing {pins[0]}")
    return folder


def source(folder: Path, python: Path, pin: str) -> Path:
    """A folder with the source of a package, as published: pip asks it for its metadata, nothing is built."""
    stamp = _stamp([pin])
    if not _is_ready(folder, stamp):
        print(f"Downloading the source of {pin} (once) ...", file=sys.stderr)
        with _made_anew(folder, stamp) as partial, tempfile.TemporaryDirectory(dir=folder.parent) as download:
            words = (*_DOWNLOAD, pin.partition("==")[0], "--dest", download, pin)
            _checked([python, *words], f"downloading {pin}")
            (archive,) = Path(download).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(Path(download) / "all", filter="data")
            (unpacked,) = (Path(download) / "all").iterdir()
            unpacked.rename(partial)
    return folder


@contextmanager
def _made_anew(folder: Path, stamp: str) -> Iterator[Path]:
    """Where the folder is made: it gets its name when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    for stale in (folder, partial):
        shutil.rmtree(stale, ignore_errors=True)
    yield partial
    _finish(partial, stamp)
    partial.rename(folder)


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _stamp(seed: Iterable[str]) -> str:
    text = "\n".join([*seed, platform.python_version()])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_ready(folder: Path, stamp: str) -> bool:
    path = folder / ".stamp"
    return path.exists() and path.read_text() == stamp


def _finish(folder: Path, stamp: str) -> None:
    (folder / ".stamp").write_text(stamp)


def _has_this_python(folder: Path) -> bool:
    """Whether the environment is there and has the version that runs now."""
    ask: list[str | Path] = [_python(folder), "-c", "import platform; print(platform.python_version())"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return False
    return found == platform.python_version()


def _new_venv(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _checked([sys.executable, "-m", "venv", folder], "python -m venv")


def _checked(command: Sequence[str | Path], purpose: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise Failed(purpose, done.stdout)


def main(words: Sequence[str]) -> int:
    """Make the environment that the command line names and print its Python."""
    known = {"project": project, "fixtures": fixtures, "judge": judge}
    if len(words) != 1 or words[0] not in known:
        print(f"usage: environments.py {'|'.join(known)}", file=sys.stderr)
        return 2
    try:
        print(known[words[0]]())
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
