"""The search itself: that it finds a false prediction and makes its recipe small, and that damage is damage."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from loader_matrix import damage

import rewrite
from tests.recipes import Recipe, make
from tests.shrinking import shrink, simpler
from tests.support import FIXTURES

LARGE = Recipe(
    seed=5,
    base="llmcompressor-llama",
    groups=(("fp8-tensor-static", ("re:.*mlp.*", "re:.*self_attn.*")), ("int8", ("re:.*down_proj$",))),
    ignore=("lm_head", "re:.*layers\\.0\\..*", "re:.*shared_expert.*", "re:.*in_proj_z$", "re:.*visual.*"),
    kv_cache=True,
    shards=5,
)


def test_shrinking_keeps_what_shows_the_fault_and_nothing_else() -> None:
    """A fault of a KV cache beside an INT8 layer, with one entry in ignore."""

    def shows(recipes: Sequence[Recipe]) -> list[bool]:
        return [
            recipe.kv_cache and any(kind == "int8" for kind, _ in recipe.groups) and "lm_head" in recipe.ignore
            for recipe in recipes
        ]

    assert shrink(LARGE, shows) == Recipe(
        5, "llmcompressor-llama", (("int8", ("re:.*down_proj$",)),), ("lm_head",), True, 1, alike_inputs=True
    )


def test_each_smaller_recipe_lacks_something() -> None:
    """So shrinking ends."""

    def size(recipe: Recipe) -> int:
        targets = sum(len(targets) for _, targets in recipe.groups)
        return targets + len(recipe.ignore) + recipe.shards + recipe.kv_cache - recipe.alike_inputs

    assert all(size(recipe) < size(LARGE) for recipe in simpler(LARGE))


class _ServesAll:
    """An engine that serves every checkpoint as it is."""

    def __init__(self, _: str) -> None: ...

    def load(self, checkpoints: Sequence[object], _: Path) -> list[list[dict[str, object]]]:
        layer = {"layer": "qkv_proj", "module": "qkv_proj", "rank": 0, "errors": {"q": 0.0}, "input_scale": "equal"}
        layers = [layer | {"cast": False}]
        return [[{"layers": layers, "strays": [], "not_compared": [], "kv_cache": "none"}] for _ in checkpoints]

    def close(self) -> None:
        """It has no process."""


def test_a_false_prediction_is_found_and_its_recipe_made_small(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Injected: "garbled" wherever the KV cache has a scheme."""
    pytest.importorskip("tomllib")  # Python 3.11: the engines' versions are read with it
    from loader_matrix import search, trials

    def predict(folder: Path, engines: Sequence[str]) -> dict[str, str]:
        config = json.loads((folder / "config.json").read_text())
        false = config["quantization_config"].get("kv_cache_scheme") is not None
        return dict.fromkeys(engines, "garbled" if false else "exact")

    monkeypatch.setattr(search, "_process", _ServesAll)
    monkeypatch.setattr(trials, "predict", predict)
    asked = search.Search(["vllm==0.32.0"])
    assert search.search([search.Named("one", LARGE)], asked, shrinks=True) > 0
    asked.close()
    printed = capsys.readouterr().out
    assert "one, original, vllm==0.32.0: predicted garbled; serves: exact" in printed
    smallest = printed.partition("smallest for original")[2].splitlines()[1]
    assert "ignore=(), kv_cache=True, shards=1, alike_inputs=True" in smallest
    assert smallest.count("re:") == 1


def test_an_engine_is_asked_one_question_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fast engine's thread took the next question of a slow one, and both read the answer to the first."""
    pytest.importorskip("tomllib")  # as above
    from loader_matrix import search, trials

    engines, overlaps = ("vllm==0.32.0", "sglang==0.5.23"), []

    class Busy(_ServesAll):
        def __init__(self, spec: str) -> None:
            self.seconds, self.asked = (0.2 if spec == engines[0] else 0.0), threading.Lock()

        def load(self, checkpoints: Sequence[object], folder: Path) -> list[list[dict[str, object]]]:
            if self.asked.locked():
                overlaps.append(folder)
            with self.asked:
                time.sleep(self.seconds)
            return super().load(checkpoints, folder)

    def attempt(source: Path, *_: object) -> trials.Tried:
        predictions = dict.fromkeys(engines, "exact")
        trial = trials.Trial(source.name, "original", source, source, predictions, source.name)
        return trials.Tried(source.name, [trial])

    monkeypatch.setattr(search, "_AT_A_TIME", 1)
    monkeypatch.setattr(search, "_process", Busy)
    monkeypatch.setattr(search, "_attempt", attempt)
    asked = search.Search(engines)
    assert not list(asked.run([tmp_path / str(number) for number in range(4)]))
    asked.close()
    assert not overlaps


def test_what_agrees_is_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search, with true predictions."""
    pytest.importorskip("tomllib")  # as above
    from loader_matrix import search, trials

    monkeypatch.setattr(search, "_process", _ServesAll)
    monkeypatch.setattr(trials, "predict", lambda _, engines: dict.fromkeys(engines, "exact"))
    asked = search.Search(["vllm==0.32.0"])
    assert search.search([search.Named("one", LARGE)], asked, shrinks=True) == 0
    asked.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``out`` of a Qwen3.5, and of one whose MLPs only are quantized, by a recipe with targets that matter."""
    folder = tmp_path_factory.mktemp("damage")
    rewrite.convert(FIXTURES / "llmcompressor-qwen3_5-text", folder / "out", selection="all")
    return folder / "out"


@pytest.mark.parametrize("kind", damage.DAMAGES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_verify_fails_what_was_damaged(converted: Path, kind: damage.Damage, seed: int, tmp_path: Path) -> None:
    """Of every kind, on a checkpoint that verify holds."""
    shutil.copytree(converted, tmp_path / "out")
    assert kind(tmp_path / "out", random.Random(seed)) is not None
    assert not rewrite.verify(FIXTURES / "llmcompressor-qwen3_5-text", tmp_path / "out", device="cpu", tokens=2).ok


def test_an_entry_that_nothing_needs_is_not_dropped(tmp_path: Path) -> None:
    """Dropping what matches no module would not be damage."""
    recipe = Recipe(1, "llmcompressor-llama", (("fp8-tensor-static", ("re:.*mlp.*",)),), ("re:.*visual.*",), False, 1)
    make(recipe, tmp_path / "in")
    assert damage.drop_ignored(tmp_path / "in", random.Random(0)) is None
