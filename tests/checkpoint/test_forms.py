"""Modules that are alike have one form: names that differ in numbers only, the same tensors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rewrite.checkpoint.forms import find_forms
from rewrite.checkpoint.header import TensorInfo


def tensor(name: str, dtype: str = "BF16", *shape: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, 0, 0)


def test_numbers_between_dots_do_not_count() -> None:
    """``layers.1`` and ``layers.22`` are alike; ``w1`` and ``w3``, ``conv1d`` are names."""
    names = ["layers.1.w1.weight", "layers.22.w1.weight", "layers.1.w3.weight", "layers.1.conv1d.weight"]
    forms = find_forms(map(tensor, names))
    assert forms["layers.1.w1"] is forms["layers.22.w1"]
    assert len({id(form) for form in forms.values()}) == 3
    assert forms["layers.22.w1"].pattern == "layers.0.w1"


def test_other_dtypes_shapes_or_tensors_are_another_form() -> None:
    """A module that lacks a scale is not alike."""
    tensors = [
        *(tensor(f"{n}.a.weight", "F8_E4M3", 2, 2) for n in range(4)),
        tensor("0.a.weight_scale", "F32"),
        tensor("1.a.weight_scale", "F32", 1),
        tensor("2.a.weight_scale", "BF16"),
    ]
    assert len({id(form) for form in find_forms(tensors).values()}) == 4


@given(st.permutations([tensor(f"{n}.a.{kind}") for n in range(3) for kind in ("weight", "bias", "weight_scale")]))
def test_the_order_of_tensors_does_not_count(tensors: list[TensorInfo]) -> None:
    """Shards hold scales first, or last."""
    (form,) = {id(form): form for form in find_forms(tensors).values()}.values()
    assert list(form.tensors) == ["bias", "weight", "weight_scale"]


def test_a_tensor_without_a_module() -> None:
    """Its name has no dot: the module has no name."""
    assert find_forms([tensor("scale")])[""].tensors == {"scale": ("BF16", ())}
