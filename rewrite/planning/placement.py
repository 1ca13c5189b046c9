"""Where the tensors of a rewritten shard go, so that as many bytes as possible can be shared with the source file.

Filesystems that share extents share whole blocks only: a run of bytes can be cloned when it starts at the same offset
modulo the block size as in the source (ioctl_ficlonerange(2)). Two things can be chosen: how far the header is padded,
which moves all data by a multiple of 8, and the order of the tensors: any is legal (safetensors ``tensor.rs``).
A scale that grows from 2 to 2·N bytes shifts what follows by 2·N - 2, which padding alone cannot make up for: a few
small tensors then move behind the large ones. Pure, and blind to the filesystem: same input, same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rewrite.checkpoint.header import ALIGNMENT

#: Block size of XFS, Btrfs, ext4 and bcachefs as they are made by default; a filesystem with larger blocks copies.
BLOCK = 4096

_MINOR = 256  # less than a 256th of a shard, or of a run, is not worth the disorder
_MAX_CORES = 8  # real shards have one or two large runs; this bounds the search in strange ones


class Piece(NamedTuple):
    """A tensor of the new shard: ``size`` bytes, from the offset ``source`` of the source file or, if None, new. What
    ``tensor`` is does not count here.

    Its offset must be a multiple of ``width``, the bytes of an element, if it is ``strict``: a tensor that is
    misaligned in the source may stay so.
    """

    tensor: Any
    width: int
    size: int
    source: int | None
    strict: bool = True

    @property
    def movable(self) -> bool:
        """Whether it may leave its place: it fills no block, so nothing is lost and little is out of order."""
        return self.size < BLOCK


@dataclass(frozen=True)
class Placement:
    """An order, and where its data must start modulo :data:`BLOCK` (None: anywhere) to share ``shareable`` bytes."""

    order: tuple[Piece, ...]
    residue: int | None
    shareable: int


@dataclass(frozen=True)
class _Run:
    """Pieces ``[first, stop)`` of an order: adjacent there and in the source, from ``offset`` of the new data on."""

    first: int
    stop: int
    source: int
    offset: int
    length: int

    @property
    def lag(self) -> int:
        """Where data must start, modulo :data:`BLOCK`, for this run to keep its place in a block."""
        return (self.source - self.offset) % BLOCK


def place(pieces: Sequence[Piece]) -> Placement:
    """The order and start that let most bytes be shared; the order of ``pieces`` unless another one shares more."""
    plain = _aligned(pieces)
    orders = [plain, *_congruent(plain)]
    return max(map(_judge, orders), key=lambda placement: placement.shareable)  # the first of equals: least moved


def whole_blocks(start: int, length: int) -> tuple[int, int]:
    """Start and length of the whole blocks within a range of a file; a length of 0 where there are none."""
    first = -(-start // BLOCK) * BLOCK
    return first, max((start + length) // BLOCK * BLOCK - first, 0)


def _aligned(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """The order as it is, unless grown tensors push one off its dtype's alignment; then widest dtype first.

    Widest first is the stock writer's order, and aligned whatever the sizes are.
    """
    if _keeps_alignment(pieces):
        return tuple(pieces)
    return tuple(sorted(pieces, key=lambda piece: -piece.width))


def _keeps_alignment(order: Iterable[Piece]) -> bool:
    offset = 0
    for _, width, size, _, strict in order:
        if strict and offset % width:
            return False
        offset += size
    return True


def _judge(order: tuple[Piece, ...]) -> Placement:
    """Every start that suits some run, by the bytes it shares."""
    shared: Counter[int] = Counter()
    for run in _runs(order):
        if run.lag % ALIGNMENT == 0:
            shared[run.lag] += whole_blocks(run.source, run.length)[1]
    residue = max(shared, key=lambda start: shared[start], default=None)
    if residue is None or not shared[residue]:
        return Placement(order, None, 0)
    return Placement(order, residue, shared[residue])


def _runs(order: Iterable[Piece]) -> Iterator[_Run]:
    first, stop, begin, end, offset = 0, 0, 0, -1, 0  # of a run: [begin, end) of the source; -1: there is none
    for index, (_, _, size, source, _) in enumerate(order):
        if not size:
            continue  # an empty tensor takes no place, wherever the source has it
        if source != end:
            if end >= 0:
                yield _Run(first, stop, begin, offset - (end - begin), end - begin)
            first, begin, end = (index, source, source) if source is not None else (index, 0, -1)
        if source is not None:
            stop, end = index + 1, end + size
        offset += size
    if end >= 0:
        yield _Run(first, stop, begin, offset - (end - begin), end - begin)


def _congruent(order: tuple[Piece, ...]) -> Iterator[tuple[Piece, ...]]:
    """Orders in which movable pieces have moved to the end, so that large runs suit one start.

    Narrow pieces go anywhere; wide ones need an end that is aligned for them. So try all, then only narrower ones.
    """
    cores = _cores(order)
    for widest in sorted({piece.width for piece in order if piece.movable}, reverse=True):
        moved = _choose(order, cores, widest)
        if moved:
            rest = [piece for index, piece in enumerate(order) if index not in moved]
            behind = sorted((order[index] for index in sorted(moved)), key=lambda piece: -piece.width)
            new = (*rest, *behind)
            if _keeps_alignment(new):
                yield new


def _cores(order: Sequence[Piece]) -> list[_Run]:
    """The large runs without minor edges, largest first. What lies between them may move, they stay whole."""
    runs = list(_runs(order))
    worth = max(sum(run.length for run in runs) // _MINOR, BLOCK)
    large = sorted((run for run in runs if run.length >= worth), key=lambda run: -run.length)
    return [_trim(order, run) for run in large[:_MAX_CORES]]


def _trim(order: Sequence[Piece], run: _Run) -> _Run:
    allowed = run.length // _MINOR
    first, stop, front, back = run.first, run.stop, 0, 0
    while front + order[first].size <= allowed:
        front += order[first].size
        first += 1
    while back + order[stop - 1].size <= allowed:
        back += order[stop - 1].size
        stop -= 1
    return _Run(first, stop, run.source + front, run.offset + front, run.length - front - back)


def _choose(order: Sequence[Piece], cores: Iterable[_Run], widest: int) -> set[int]:
    """Pieces to move, by index, so that the largest cores suit one start: as many of them as can be had together."""
    together: list[_Run] = []
    moved: set[int] = set()
    for core in cores:
        trial = sorted([*together, core], key=lambda core: core.first)
        found = _reconcile(order, trial, widest)
        if found is not None:
            together, moved = trial, found
    return moved


def _reconcile(order: Sequence[Piece], cores: Iterable[_Run], widest: int) -> set[int] | None:
    """Pieces to move so that all ``cores``, in the order of their offsets, suit one start; None if there are none.

    Padding takes the first core anywhere in steps of :data:`ALIGNMENT`; the others must keep their distance to it.
    """
    moved: set[int] = set()
    begin, lag, modulus = 0, 0, ALIGNMENT
    for core in cores:
        loose = [i for i in range(begin, core.first) if order[i].movable and order[i].width <= widest]
        # The largest first, so that few are needed; among equals the last, so that little else shifts.
        loose.sort(key=lambda i: (-(order[i].size % modulus), -i))
        found = _subset([order[i].size for i in loose], (lag - core.lag) % modulus, modulus)
        if found is None:
            return None
        moved.update(loose[number] for number in found)
        begin, lag, modulus = core.stop, core.lag, BLOCK
    return moved


def _subset(sizes: Iterable[int], target: int, modulus: int) -> list[int] | None:
    """Indices of sizes that add up to ``target`` modulo ``modulus``; None if no choice of them does.

    Bit r of ``reached`` says that r can be had from the sizes so far: one rotation for each size.
    """
    reached = 1
    steps: list[tuple[int, int, int]] = []
    for index, size in enumerate(sizes):
        if reached >> target & 1:
            break
        shift = size % modulus
        rotated = (reached << shift | reached >> (modulus - shift)) & ((1 << modulus) - 1)
        if fresh := rotated & ~reached:
            steps.append((index, shift, fresh))
            reached |= fresh
    if not reached >> target & 1:
        return None
    chosen = []
    for index, shift, fresh in reversed(steps):
        if fresh >> target & 1:
            chosen.append(index)
            target = (target - shift) % modulus
    return chosen
