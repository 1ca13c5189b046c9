"""Where tensors go: nothing lost, everything aligned, and as many bytes as can be where they can be shared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewrite.planning.placement import BLOCK, Piece, Placement, place, whole_blocks

MB = 1 << 20


def stock(*tensors: tuple[str, int, int] | tuple[str, int, int, int], start: int = 1000) -> list[Piece]:
    """Tensors (name, width, bytes, new bytes if it changes) as they lie in the source, from ``start`` on."""
    pieces = []
    for name, width, size, *new in tensors:
        pieces.append(Piece(name, width, new[0] if new else size, None if new else start))
        start += size
    return pieces


def names(placement: Placement) -> list[str]:
    return [piece.tensor for piece in placement.order]


def offsets(placement: Placement) -> Iterator[tuple[Piece, int]]:
    """Each piece with its offset in the new file, whose data starts where the placement wants it."""
    offset = placement.residue or 0
    for piece in placement.order:
        yield piece, offset
        offset += piece.size


def test_a_grown_scale_that_padding_can_make_up_for() -> None:
    """16 bytes become 8 kB: the shift is a multiple of 8, nothing moves, the header ends where it must."""
    pieces = stock(("scale", 2, 16, 8192 + 24), ("weight", 1, MB))
    placement = place(pieces)
    assert names(placement) == ["scale", "weight"]
    assert placement.residue == (1016 - 8216) % BLOCK
    assert placement.shareable == MB - BLOCK


def test_a_scalar_moves_behind_where_padding_cannot() -> None:
    """2 bytes become 8 kB, 2 others move behind, the last ones: the weights are off by a multiple of 8 then."""
    pieces = stock(*((f"norm{i}", 2, 2) for i in range(5)), ("scale", 2, 2, 8192), ("weight", 1, MB), start=1004)
    placement = place(pieces)
    assert names(placement) == ["norm0", "norm1", "norm2", "norm3", "scale", "weight", "norm4"]
    assert placement.shareable == MB - BLOCK


def test_wide_scalars_do_not_go_where_they_would_be_misaligned() -> None:
    """The weights end at an odd multiple of two: an F32 must stay, though it alone would do."""
    pieces = stock(("f32", 4, 4), ("b0", 2, 2), ("b1", 2, 2), ("b2", 2, 2), ("scale", 2, 2, 6), ("w", 1, MB + 2))
    placement = place(pieces)
    assert names(placement) == ["f32", "b0", "scale", "w", "b1", "b2"]
    assert placement.shareable == MB - BLOCK


def test_two_large_runs_keep_their_distance() -> None:
    """Embeddings before the scales, FP8 weights behind them: one start suits both once 4094 bytes have moved."""
    small = [(f"norm{i}", 2, 512) for i in range(7)] + [(f"b{i}", 2, 2) for i in range(300)]
    pieces = stock(("embed", 2, 3 * MB), *small, ("scale", 2, 2, 8192), ("weight", 1, 9 * MB), start=2000)
    placement = place(pieces)
    assert placement.shareable == 12 * MB - 2 * BLOCK
    assert len(names(placement)) - names(placement).index("weight") - 1 == 7 + 255


def test_where_only_one_large_run_can_be_had_it_is_the_larger() -> None:
    """Too little to move: the embeddings lose."""
    few = [(f"b{i}", 2, 2) for i in range(4)]
    placement = place(stock(("embed", 2, MB), *few, ("scale", 2, 2, 8192), ("weight", 1, 9 * MB)))
    assert placement.shareable == 9 * MB - BLOCK


def test_the_source_order_stays_where_nothing_can_be_won() -> None:
    """No scalar to spare: eight-byte padding as ever, no block shared."""
    placement = place(stock(("scale", 2, 2, 8192), ("weight", 1, MB)))
    assert (names(placement), placement.residue, placement.shareable) == (["scale", "weight"], None, 0)


@pytest.mark.parametrize("range_", [(0, 4096), (1, 8191), (1, 8190), (4096, 4095), (5, 0), (8192, 12288)])
def test_whole_blocks(range_: tuple[int, int]) -> None:
    """Against every block of the file."""
    start, length = range_
    blocks = [b for b in range(0, 40960, BLOCK) if start <= b and b + BLOCK <= start + length]
    assert whole_blocks(start, length)[1] == len(blocks) * BLOCK
    assert not blocks or whole_blocks(start, length)[0] == blocks[0]


WIDTHS = st.sampled_from([1, 2, 4, 8])


@st.composite
def shards(draw: st.DrawFn) -> list[Piece]:
    """Tensors of any size in any order, some of which grow or are misaligned in the source."""
    start = 8 * draw(st.integers(1, 600))
    pieces, offset = [], 0
    for i in range(draw(st.integers(1, 14))):
        width = draw(WIDTHS)
        size = width * draw(st.sampled_from([0, 1, 1, 1, 2, 3, 32, 257, 2048, 4097, 20000]))
        changed = draw(st.booleans())
        new = width * draw(st.sampled_from([1, 5, 2048, 4096])) if changed else size
        strict = changed or offset % width == 0
        pieces.append(Piece(f"t{i}", width, new, None if changed else start + offset, strict))
        offset += size
    return pieces


@given(shards())
def test_any_mix_is_complete_aligned_and_counted_right(pieces: list[Piece]) -> None:
    """Every tensor once; a start that keeps data 8-byte aligned; shareable is what blocks there are to share."""
    placement = place(pieces)
    assert sorted(placement.order, key=lambda piece: piece.tensor) == sorted(pieces, key=lambda piece: piece.tensor)
    assert (placement.residue or 0) % 8 == 0
    in_order = all(piece.strict for piece in pieces)
    for piece, offset in offsets(placement):
        assert offset % piece.width == 0 or not in_order
    assert placement.shareable == blocks_kept(placement.order, placement.residue)
    assert place(pieces) == placement


def test_an_empty_tensor_does_not_part_its_neighbors() -> None:
    """Moved between two that lie side by side in the source, it leaves them one run: the block across is shared too."""
    names = [("t0", 4, 8192, 8), ("t1", 2, 4096, 8200), ("new", 1, 1, None), ("empty", 4, 0, 12296)]
    pieces = [Piece(name, width, size, source) for name, width, size, source in names]
    placement = place(pieces)
    assert [piece.tensor for piece in placement.order] == ["t0", "empty", "t1", "new"]
    assert placement.shareable == 8192


@given(shards())
def test_never_worse_than_the_source_order(pieces: list[Piece]) -> None:
    """With the best of all starts."""
    if _aligned(pieces):
        best = max(blocks_kept(pieces, start) for start in range(0, BLOCK, 8))
        assert place(pieces).shareable >= best


def blocks_kept(order: Sequence[Piece], residue: int | None) -> int:
    """Bytes of the blocks of the source that come to lie in a block of the new file: by a map of block to bytes."""
    if residue is None:
        return 0
    kept: dict[tuple[int, int], int] = {}
    offset = residue
    for piece in order:
        if piece.source is not None and (piece.source - offset) % BLOCK == 0:
            for block in range(piece.source // BLOCK, -(-(piece.source + piece.size) // BLOCK)):
                first, end = max(piece.source, block * BLOCK), min(piece.source + piece.size, (block + 1) * BLOCK)
                key = (block, offset - piece.source)
                kept[key] = kept.get(key, 0) + end - first
        offset += piece.size
    return sum(count for count in kept.values() if count == BLOCK)


def _aligned(order: Iterable[Piece]) -> bool:
    offset = 0
    for piece in order:
        if piece.strict and offset % piece.width:
            return False
        offset += piece.size
    return True


@st.composite
def one_large_run(draw: st.DrawFn) -> list[Piece]:
    """Small tensors, widest first as stock writers have them, some of which grow, before one large one."""
    start = 8 * draw(st.integers(1, 600))
    widths = sorted(draw(st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=8)), reverse=True)
    pieces, offset = [], 0
    for i, width in enumerate(widths):
        size = width * draw(st.integers(1, 3))
        grown = width * draw(st.integers(1, 2000)) if draw(st.booleans()) else None
        pieces.append(Piece(f"t{i}", width, grown or size, None if grown else start + offset))
        offset += size
    return [*pieces, Piece("large", 1, MB + draw(st.integers(0, 8)), start + offset)]


@given(one_large_run())
def test_a_large_run_is_reached_whenever_moving_small_tensors_can_reach_it(pieces: list[Piece]) -> None:
    """Against every subset of the small ones moved behind."""
    *small, large = pieces
    movable = [piece for piece in small if piece.movable]
    subsets = chain.from_iterable(combinations(movable, n) for n in range(len(movable) + 1))
    reachable = any(_reaches(small, subset, large) for subset in subsets)
    assert (place(pieces).shareable >= MB - BLOCK) == reachable


def _reaches(small: list[Piece], moved: tuple[Piece, ...], large: Piece) -> bool:
    kept = [piece for piece in small if piece not in moved]
    behind = sorted(moved, key=lambda piece: -piece.width)
    assert large.source is not None
    return _aligned([*kept, large, *behind]) and (large.source - sum(piece.size for piece in kept)) % 8 == 0
