"""Lets engines load the checkpoints of `families`, by the driver of `rewrite try`, and compares with the predictions.

    scripts/evidence.sh try_families FOLDER --keep DIR [--engine NAME==VERSION] [--record]

FOLDER is what `families` wrote. What an engine made of each is kept in DIR, and not run again. --record writes
rewrite/loaders/measured.json: what was run, what was seen, and whether the rules of `inspect` say the same.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.driver import Unavailable
from engines.known import find_engine
from engines.process import Checkpoint, load

import rewrite
from rewrite.errors import RewriteError
from rewrite.loaders.measured import FILE, signature
from rewrite.loaders.outcome import E4M3_ROUNDING
from rewrite.loaders.versions import find_loaders
from rewrite.loaders.views import view_model
from rewrite.quantization.atlas import architectures
from rewrite.quantization.model import Model, interpret
from rewrite.trying import verdict

ENGINES = ("vllm==0.32.0", "sglang==0.5.23")
#: What `try` says, in the words of the predictions. Nothing is learnt from what is not here.
KINDS = {
    verdict.EXACT: "exact",
    verdict.ROUNDED: "exact",
    verdict.LESS: "loses precision",
    verdict.GARBLED: "garbled",
    verdict.UNFILLED: "garbled",
    verdict.FAILS: "fails to load",
}
NOTHING = "nothing learnt"
_ROUNDED = 2.0**-8  # once to BF16
_TOWER = re.compile("vision|visual|audio")


@dataclass(frozen=True)
class Cell:
    """One checkpoint in one engine."""

    engine: str
    family: str
    model: Model
    seen: str
    said: str
    why: str
    off_seen: frozenset[str]  # the fused layers, and "experts", of which any part was off
    off_said: frozenset[str]
    open: frozenset[str]  # those of which the rules say that they do not know

    @property
    def agrees(self) -> bool:
        """In kind, and on the layers: what is said of one layer must not hide what is seen of another."""
        loads = self.seen != "fails to load"
        same = self.seen == self.said or (self.said == "not known" and self.open and loads)
        whole = self.said == "garbled" and not self.off_said  # of no layer by its name
        return bool(same) and (whole or self.off_seen - self.open == self.off_said - self.open)


def seen_in(out: Path) -> tuple[str, str, frozenset[str]]:
    """What became of a checkpoint, why, and the layers that were off."""
    kind, why, found = _judged(out)
    layers = found.layers if found is not None and found.failure is None else ()
    language = (each for each in layers if not _TOWER.search(each.module))
    names = (
        each.module.rpartition(".")[2] for each in language if each.error is not None and not each.error <= _ROUNDED
    )
    return kind, why, frozenset(name.removeprefix("routed_").removesuffix("_with_mqa") for name in names)


def _judged(out: Path) -> tuple[str, str, verdict.Verdict | None]:
    if not out.exists():
        return NOTHING, "the engine ended without a result", None
    result = json.loads(out.read_text())
    try:
        found = verdict.judge(result)
    except RewriteError as error:
        # Names that an engine does not know it refuses without a quantization, too.
        kind = "fails to load" if out.stem.endswith("-names") else NOTHING
        return kind, str(error).partition("found:")[2].strip() or str(error), None
    if found.failure is not None and "Please use Blackwell" in found.failure["message"]:
        return NOTHING, "SGLang's experts in NVFP4 of compressed-tensors want a Blackwell card", found
    if found.failure is not None:
        return KINDS.get(found.kind, NOTHING), f"{found.failure['type']}: {found.failure['message']}", found
    kind = KINDS.get(found.kind, NOTHING)
    if kind == "loses precision" and any(each.error and each.error > E4M3_ROUNDING for each in found.layers):
        kind = "garbled"  # more than a rounding, as the rules have it
    off = sorted({f"{each.module.rpartition('.')[2]} {each.error:.2g}" for each in found.layers if each.error})
    return kind, "; ".join(off or found.unlearnt[:2]), found


def cells(spec: str, sources: list[Path], home: Path) -> Iterator[Cell]:
    """Run what was not run yet, and compare all."""
    served = architectures(f"{find_loaders(spec.replace('==', '@'))[0].name} {spec.partition('==')[2]}")
    own = [source for source in sources if _architecture(source) in served]
    outs = {source: home / f"{spec}-{source.name}.json" for source in own}
    run(spec, {source: out for source, out in outs.items() if not out.exists()})
    (loader,) = find_loaders(spec.replace("==", "@"))
    for source, out in outs.items():
        model = interpret(rewrite.open_checkpoint(source))
        seen, why, off = seen_in(out)
        view = view_model(model, "all")
        said = loader.by_rules(view)
        fused = {group.kind for group in view.groups} | {"experts"}
        kinds = [(group.kind, loader.of_group(group).kind) for group in view.groups]
        named = frozenset(name.partition(".")[0] for name in said.partitions)
        weights = said.kind in ("garbled", "loses precision")
        named |= {layer for layer, kind in kinds if weights and kind in ("garbled", "loses precision")}
        release = f"{loader.name} {spec.partition('==')[2]}"
        unknown = frozenset(layer for layer, kind in kinds if kind == "not known")
        yield Cell(release, source.name, model, seen, said.kind, why, off & fused, named, unknown)


def run(spec: str, outs: Mapping[Path, Path]) -> None:
    """Let an engine try checkpoints; a file for each that it has a result of."""
    engine = find_engine(spec)
    checkpoints = [Checkpoint(source.name, source.resolve(), source.resolve()) for source in outs]
    for out, results in zip(outs.values(), load(engine, "engines.trying", checkpoints, quiet=True), strict=True):
        if not isinstance(results, Unavailable) and "fault" not in results[0]:
            out.write_text(json.dumps(results[0] | {"version": engine.version}))


def _architecture(source: Path) -> str:
    return str((json.loads((source / "config.json").read_text()).get("architectures") or [""])[0])


def recorded(found: list[Cell], before: dict[str, Any]) -> dict[str, Any]:
    """By engine and architecture: the scheme, the modules that have it (a number in ``modules``), what was seen. What
    was recorded before stays, but where the same was run again."""
    modules: list[list[str]] = before["modules"]
    engines: dict[str, dict[str, list[dict[str, Any]]]] = before["engines"]
    for cell in found:
        architecture, scheme, names = signature(cell.model)
        if cell.seen == NOTHING or not names:
            continue
        if (held := sorted(names)) not in modules:
            modules.append(held)
        entry = {"scheme": scheme, "modules": modules.index(held), "seen": cell.seen}
        if not cell.agrees:
            entry |= {"said": f"{cell.said} {sorted(cell.off_said)}", "why": cell.why[:120]}
        own = engines.setdefault(cell.engine, {}).setdefault(architecture, [])
        own[:] = [each for each in own if (each["scheme"], each["modules"]) != (scheme, entry["modules"])] + [entry]
    sorted_engines = {engine: dict(sorted(families.items())) for engine, families in engines.items()}
    return {"date": time.strftime("%Y-%m-%d"), "modules": modules, "engines": sorted_engines}


def dump(value: dict[str, Any]) -> str:
    """A line for each set of modules and each cell, so that a diff can be read."""
    lines = ["{", f'"date": "{value["date"]}",', '"modules": [']
    lines += [",\n".join(json.dumps(each) for each in value["modules"]), "],", '"engines": {']
    engines = []
    for engine, families in value["engines"].items():
        rows = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, held)) + "]" for name, held in families.items()]
        engines.append(f"{json.dumps(engine)}: {{\n" + ",\n".join(rows) + "}")
    return "\n".join([*lines, ",\n".join(engines), "}", "}"]) + "\n"


def main() -> int:
    """Run and compare; 1 where a prediction is contradicted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keep", type=Path, required=True)
    parser.add_argument("--engine", action="append")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    given.keep.mkdir(parents=True, exist_ok=True)
    sources = sorted(path.parent for path in given.folder.glob("*/config.json"))
    found = [cell for spec in given.engine or ENGINES for cell in cells(spec, sources, given.keep.absolute())]
    contradicted = 0
    for cell in found:
        claims = (cell.said != "not known" or bool(cell.open)) and cell.seen != NOTHING
        contradicted += claims and not cell.agrees
        word = "agrees" if cell.agrees else "CONTRADICTED" if claims else "no claim"
        print(f"{cell.engine} {cell.family}: {word}: seen {cell.seen}, said {cell.said}; {cell.why[:200]}")
    print(dict(Counter((cell.engine, cell.seen, "agrees" if cell.agrees else "differs") for cell in found)))
    if given.record:
        FILE.write_text(dump(recorded(found, json.loads(FILE.read_text()))))
    return 1 if contradicted else 0


if __name__ == "__main__":
    sys.exit(main())
