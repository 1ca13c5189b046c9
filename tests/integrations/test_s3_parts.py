"""The parts of an object: by the rules of S3, and together the planned bytes."""

from __future__ import annotations

import random

import pytest

from rewrite.checkpoint.storage import FileId
from rewrite.integrations.s3_parts import (
    MAX_OBJECT,
    MAX_PART,
    MAX_PARTS,
    MIN_PART,
    CopyPart,
    Run,
    numbered_sizes,
    plan_parts,
)
from rewrite.planning.jobs import FileCopy, ShardPlan
from rewrite.planning.segments import Copy, Dequantize, Fill, Lookup, Segment

_TABLE = tuple(bytes([i, 0]) for i in range(256))


def draw(random_: random.Random) -> ShardPlan:
    """A shard of up to thirty segments of any length, now and then far beyond what there is."""
    position, segments = 0, list[Segment]()
    for _ in range(random_.randrange(30)):
        kind = random_.random()
        if kind < 0.6:
            position += random_.choice([0, 1, 2, 4096])
            length = int(2 ** random_.uniform(0, random_.choice([20, 24, 30, 37])))
            segments.append(Copy(position, length))
            position += length
        elif kind < 0.8:
            segments.append(Fill(b"ab", random_.randrange(1, 1 << random_.randrange(1, 25))))
        elif kind < 0.9:
            segments.append(Lookup(position, random_.randrange(1, 1 << 30), _TABLE))
        else:
            rows, columns = random_.randrange(1, 1 << 14), random_.randrange(1, 1 << 14)
            segments.append(Dequantize(position, rows, columns, (128, 128), 0, "F32", "BF16"))
    header = b"h" * random_.randrange(8, 1 << random_.randrange(4, 24))
    return ShardPlan("x", FileId(position, 0), header, tuple(segments))


def flat(segments: list[Segment]) -> list[Segment]:
    """With copies that continue each other joined, and nothing empty."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if isinstance(segment, Copy) and isinstance(last, Copy) and last.start + last.length == segment.start:
            joined[-1] = Copy(last.start, last.length + segment.length)
        elif segment.length:
            joined.append(segment)
    return joined


def content(runs: tuple[Run, ...]) -> list[Segment]:
    """What the parts are made of, in order."""
    found: list[Segment] = []
    for run in runs:
        found += [Copy(run.start, run.size)] if isinstance(run, CopyPart) else run.segments
    return flat(found)


@pytest.mark.parametrize(("copies", "plans"), [(True, 20_000), (False, 500)])
def test_parts_keep_the_rules(copies: bool, plans: int) -> None:
    """Sizes, numbers, order, and not a byte more or less."""
    most = 0
    for seed in range(plans):
        plan = draw(random.Random(seed))
        runs = plan_parts(plan, copies=copies)
        sizes = numbered_sizes(runs)
        assert list(sizes) == list(range(1, len(sizes) + 1)), seed
        assert len(sizes) <= MAX_PARTS, seed
        assert all(MIN_PART <= size <= MAX_PART for size in list(sizes.values())[:-1]), seed
        assert 0 < sizes[len(sizes)] <= MAX_PART, seed
        assert sum(sizes.values()) == plan.size, seed
        assert content(runs) == flat([Fill(plan.header, 1), *plan.segments]), seed
        if not copies:
            assert not [run for run in runs if isinstance(run, CopyPart)]
        for run in runs:
            if not isinstance(run, CopyPart):
                assert sum(run.sizes) == sum(segment.length for segment in run.segments), seed
        most = max(most, len(sizes))
    assert most > 100


def _alternating(changes: int, weight: int, longer: int = 0) -> ShardPlan:
    """Weights of ``weight`` bytes, every other one ``longer``, with a scale of two bytes changed between them."""
    position, segments = 0, list[Segment]()
    for number in range(changes):
        length = weight + longer * (number % 2)
        segments += [Fill(b"ab", 1), Copy(position, length)]
        position += length + 2
    return ShardPlan("x", FileId(position, 0), b"h" * 1000, tuple(segments))


@pytest.mark.parametrize(
    ("changes", "weight", "longer"),
    [
        (4999, 11 << 20, 0),  # all are copied
        (5100, 11 << 20, 0),
        (9600, 10_500_000, 1),
        (20_000, 12 << 20, 100 << 20),
        (100_000, MIN_PART, 1),
        (MAX_OBJECT // (100 << 20) - 1, 100 << 20, 0),
    ],
)
def test_many_places_that_change_still_fit(changes: int, weight: int, longer: int) -> None:
    """10,000 parts at most: the shortest ranges are uploaded where their copies would be too many, and no others."""
    plan = _alternating(changes, weight, longer)
    runs = plan_parts(plan, copies=True)
    sizes = list(numbered_sizes(runs).values())
    assert len(sizes) <= MAX_PARTS
    assert sum(sizes) == plan.size
    assert all(MIN_PART <= size <= MAX_PART for size in sizes[:-1])
    assert content(runs) == flat([Fill(plan.header, 1), *plan.segments])
    if changes * 2 > MAX_PARTS and weight > 2 * MIN_PART and changes < MAX_PARTS // 2 + 1000:
        copied = sum(run.size for run in runs if isinstance(run, CopyPart))
        assert copied > 0.4 * plan.size  # a few ranges are given up, not all of them
        assert len(sizes) > MAX_PARTS - 4


@pytest.mark.parametrize("limit", [4, 7, 50, 200])
def test_any_limit_of_parts(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of drawn plans; where a limit cannot be kept, that is said while planning."""
    monkeypatch.setattr("rewrite.integrations.s3_parts.MAX_PARTS", limit)
    kept = 0
    for seed in range(300):
        plan = draw(random.Random(seed))
        try:
            sizes = list(numbered_sizes(plan_parts(plan, copies=True)).values())
        except ValueError as refused:
            assert "parts of an object" in str(refused)
            continue
        kept += 1
        assert len(sizes) <= limit, seed
        assert sum(sizes) == plan.size, seed
        assert all(size >= MIN_PART for size in sizes[:-1]), seed
    assert kept > 100


def test_what_the_store_copies_is_nearly_all() -> None:
    """Of a shard with scales among gigabytes of weights: 5 MiB for every place where something changed."""
    gib = 1 << 30
    segments = (Copy(0, gib), Fill(b"ab", 6000), Copy(gib + 2, gib), Fill(b"ab", 6000), Copy(2 * gib + 4, gib))
    plan = ShardPlan("x", FileId(3 * gib, 0), b"h" * 50_000, segments)
    sent = sum(sum(run.sizes) for run in plan_parts(plan, copies=True) if not isinstance(run, CopyPart))
    assert sent == 3 * MIN_PART


def test_a_whole_file() -> None:
    """Beyond what CopyObject takes: all of it in ranges."""
    runs = plan_parts(FileCopy("x", FileId(6 << 30, 0)), copies=True)
    assert all(isinstance(run, CopyPart) for run in runs)
    assert sum(numbered_sizes(runs).values()) == 6 << 30


def test_an_object_that_no_parts_can_make() -> None:
    """Beyond 5 TiB."""
    with pytest.raises(ValueError, match="largest object"):
        plan_parts(FileCopy("x", FileId(MAX_OBJECT + 1, 0)), copies=True)
    assert len(numbered_sizes(plan_parts(FileCopy("x", FileId(MAX_OBJECT, 0)), copies=False))) <= MAX_PARTS


def test_nothing_is_no_part() -> None:
    """An empty file is written at once."""
    assert plan_parts(FileCopy("x", FileId(0, 0)), copies=True) == ()
