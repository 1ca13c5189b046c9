"""What the extraction reads of a package, and what it does not; that the page is that of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from atlas.layers import Found, Reader
from atlas.page import page
from atlas.record import lines, model_entry
from atlas.release import changes
from atlas.source import Package, find_class

from tests.support import ROOT

DATA = ROOT / "rewrite" / "quantization" / "atlas.json"
SHARED = """
class MergedColumnParallelLinear: ...
class QKVParallelLinear: ...
class RowParallelLinear: ...
def FusedMoEFactory(prefix="", ckpt_names=("gate_proj", "down_proj", "up_proj")): ...
"""
MODEL = """
from engine.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear, FusedMoEFactory
from engine.platforms import current_platform

if current_platform.is_cuda():
    from .attention import Attention
else:
    from .other import Attention

class FusedLinear(MergedColumnParallelLinear): ...

class MLP:
    def __init__(self):
        self.gate_up_proj = FusedLinear()
        self.down_proj = RowParallelLinear()

class Base:
    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    def __init__(self):
        self.mlp = MLP()
        self.attention = Attention()
    def load_weights(self, weights):
        table = [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]
        bitsandbytes_table = [("x", "y", 0)]
        table += [(f"{prefix}_in", "a", 0)]

class Model(Base):
    packed_modules_mapping = Base.packed_modules_mapping | {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model."}, orig_to_new_regex={})
    def __init__(self):
        super().__init__()
        self.experts = FusedMoEFactory()

class Alone(Base):
    def load_weights(self, weights):
        loaded_weight = loaded_weight.view(2, 3)
"""
ATTENTION = """
from engine.layers.linear import QKVParallelLinear
MAPPER = WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q"), ".k_proj": (".qkv_proj", "k"),
                                            ".v_proj": (".qkv_proj", "v")})
class Attention:
    mapper = MAPPER
    def __init__(self):
        kind = QKVParallelLinear
        self.qkv_proj = kind()
"""


@pytest.fixture
def read(tmp_path: Path) -> dict[str, Found]:
    """Two models of a small package."""
    files = {"layers/linear.py": SHARED, "models/model.py": MODEL, "models/attention.py": ATTENTION}
    for name, text in files.items():
        path = tmp_path / "engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    package = Package(tmp_path / "engine")
    reader = Reader(package)
    found = {}
    for name in ("Model", "Alone"):
        cls = find_class(package, "engine.models.model", _name(name))
        assert cls is not None
        found[name] = reader.read_model(cls)
    return found


def _name(name: str):  # type: ignore[no-untyped-def]
    import ast

    return ast.parse(name, mode="eval").body


def test_tables_kinds_and_what_is_inherited(read: dict[str, Found]) -> None:
    entry, unseen = model_entry(read["Model"])
    assert sorted(entry["layers"]) == [
        ["gate_up_proj", ["gate_proj", "up_proj"], "merged", []],
        ["qkv_proj", ["q_proj", "k_proj", "v_proj"], "qkv", []],
    ]
    assert entry["linears"] == {"down_proj": "row", "gate_up_proj": "merged", "qkv_proj": "qkv"}
    assert entry["experts"] == [["gate_proj", "up_proj", "down_proj"]]
    assert entry["packed"] == ["gate_up_proj", "qkv_proj"]
    assert entry["prefixes"] == {"model.": "language_model."} and entry["names_not_seen"]
    assert any("_in" in each for each in unseen), "what is computed is listed"
    assert any("orig_to_new_regex" in each for each in unseen)


def test_a_method_that_is_overridden_is_not_read(read: dict[str, Found]) -> None:
    """And what turns a tensor is named."""
    entry, _ = model_entry(read["Alone"])
    assert entry["layers"][0][1] == ["q_proj", "k_proj", "v_proj"]
    assert entry["alters"] == ["Alone.load_weights"] and "alters" not in model_entry(read["Model"])[0]


def test_the_page_is_that_of_the_data() -> None:
    """``scripts/evidence.sh atlas --page`` writes it."""
    not_seen = json.loads((ROOT / "scripts" / "evidence" / "atlas" / "not_seen.json").read_text())
    data = json.loads(DATA.read_text())
    assert (ROOT / "rewrite" / "loaders" / "ATLAS.md").read_text() == page(data, not_seen)
    assert lines(data) == DATA.read_text()


def test_a_release_says_what_changes_for_users() -> None:
    one, other = {"layers": [["qkv", ["q"], "qkv", []]]}, {"layers": [["qkv", ["q"], "merged", []]]}
    named = {**one, "prefixes": {"a": "b"}}
    before = {"Same": [0, ""], "Gone": [0, ""], "Fuses": [0, ""], "Names": [0, ""]}
    after = {"Same": [0, ""], "New": [0, ""], "Fuses": [1, ""], "Names": [2, ""]}
    data = {"models": [one, other, named], "families": {"vLLM 1.0": before, "vLLM 1.1": after}}
    assert list(changes(data, "vLLM 1.0", "vLLM 1.1")) == [
        "- vLLM 1.1, since 1.0, new: `New`.",
        "- vLLM 1.1, since 1.0, gone: `Gone`.",
        "- vLLM 1.1, since 1.0, fuse other layers: `Fuses`.",
        "- vLLM 1.1, since 1.0, other names or kinds: `Names`.",
    ]
