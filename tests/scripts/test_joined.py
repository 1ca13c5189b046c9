"""What the driver for INT4 and MXFP4 says of a fused parameter; the engine itself is run by scripts/evidence."""

from __future__ import annotations

import pytest
import torch
from loader_matrix.joined_vllm import _compared

ONE, TWO = torch.arange(6, dtype=torch.int32).view(2, 3), torch.arange(9, dtype=torch.int32).view(3, 3)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (torch.cat([ONE, TWO]), "joined"),
        (torch.nn.Parameter(torch.cat([ONE, TWO]), requires_grad=False), "joined"),
        (torch.cat([TWO, ONE]), "differs"),
        (torch.cat([ONE, TWO]).view(3, 5), "differs"),
        (ONE, "differs"),
        (None, "not there"),
    ],
)
def test_joined_means_the_same_bytes(held: torch.Tensor | None, said: str) -> None:
    assert _compared(held, [ONE, TWO]) == said


def test_a_missing_part_is_not_joined() -> None:
    assert _compared(torch.cat([ONE, TWO]), [ONE, None]) == "not there"


def test_floating_point_is_compared_by_its_bytes() -> None:
    """0 and -0 are not the same."""
    zero = torch.zeros(2, 2, dtype=torch.bfloat16)
    assert _compared(zero, [zero[:1], zero[1:]]) == "joined"
    assert _compared(-zero, [zero[:1], zero[1:]]) == "differs"
