"""`python -m benchmark`: makes the checkpoints, measures, prints tables. See scripts/benchmark.sh."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from benchmark import copying, filesystems, many, remote, rescaling, verifying
from benchmark.measure import ProgramFailed, can_drop_caches, machine, python, run


def main() -> int:
    options = _parse()
    cold = not options.warm and can_drop_caches()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="rewrite-benchmark-", dir=options.dir))
    try:
        print(machine(work))
        _measure(options, work, cold)
    except (copying.Disagreement, ProgramFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if options.keep:
            print(f"Kept: {work}")
        else:
            shutil.rmtree(work)
    return 0


def _measure(options: argparse.Namespace, work: Path, cold: bool) -> None:
    if options.tensors:
        for case in many.CASES:
            print(*many.report(case, many.measure(case, work, options.rounds, say=_say)), "", sep="\n", flush=True)
        return
    print(_caches(options.warm, cold))
    if options.filesystems is not None:
        _filesystems(options, work, cold)
    elif options.rescaling:
        print(*rescaling.report(rescaling.measure(work, options.rounds, cold=cold, say=_say)), sep="\n")
    elif options.remote:
        print(*remote.report(remote.measure(_make(options, work), work)), sep="\n")
    elif options.verify is not None:
        source, profiles = _make(options, work), options.verify or verifying.PROFILES
        cases = verifying.measure(source, work, profiles, options.rounds, cold=cold, say=_say)
        print(*verifying.report(cases), sep="\n")
    else:
        _copying(options, work, cold)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/benchmark.sh", description=__doc__)
    parser.add_argument("--size-gb", type=float, default=4, help="size of the checkpoint, at least (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="how often everyone runs (default 5)")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where; decides the filesystem")
    parser.add_argument("--warm", action="store_true", help="with the source in the page cache, not with cold caches")
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="instead: inspect and convert --dry-run of 100,000 to 500,000 tensors beside safe_open; next to no disk",
    )
    parser.add_argument("--rescaling", action="store_true", help="instead: one global scale for fused NVFP4 layers")
    parser.add_argument(
        "--verify",
        nargs="*",
        metavar="PROFILE",
        help="instead: how long verify takes beside cmp and sha256sum, for each profile (or some); four times the size",
    )
    parser.add_argument(
        "--filesystems",
        nargs="*",
        metavar="KIND",
        help="instead: who takes how long on ext4, xfs and btrfs (or some), in images on loop devices; root",
    )
    parser.add_argument(
        "--remote", action="store_true", help="instead: bytes over the network, for the hub and S3 of the tests"
    )
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints where they are")
    return parser.parse_args()


def _caches(warm: bool, cold: bool) -> str:
    if cold:
        return "Cold caches: before each run everything is synced and all caches are dropped."
    reason = "as asked" if warm else "dropping caches takes root"
    return f"Warm caches ({reason}): before each run everything is synced and the source is read once."


def _make(options: argparse.Namespace, work: Path) -> Path:
    source = work / "source"
    source.mkdir()
    run(python("benchmark.make", source, str(options.size_gb)))
    files = [path.stat().st_size for path in source.iterdir()]
    print(f"Checkpoint: Qwen3.5-9B shapes, {sum(files) / 1e9:.2f} GB in {len(files)} files.")
    return source


def _filesystems(options: argparse.Namespace, work: Path, cold: bool) -> None:
    source = _make(options, work)
    print("Seconds are those of the program alone; all ratios, and the next column, with everything synced to disk.\n")
    for kind in options.filesystems or filesystems.KINDS:
        try:
            measured = filesystems.measure(kind, source, work, options.rounds, cold=cold, say=_say)
        except filesystems.Skipped as reason:
            print(f"{kind}: skipped: {reason}\n")
        else:
            print(*filesystems.report(measured), "", sep="\n", flush=True)


def _copying(options: argparse.Namespace, work: Path, cold: bool) -> None:
    source = _make(options, work)
    print("Times include syncing the output to disk, for everyone; peak memory includes pages of mapped files.\n")
    runs = copying.contest(copying.CONTESTANTS, source, work, options.rounds, cold=cold, say=_say)
    print(*copying.report(runs), "", sep="\n")
    print("All outputs but that of cp hold equal tensors: names, dtypes, shapes and bytes.\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
