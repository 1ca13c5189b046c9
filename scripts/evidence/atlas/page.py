"""The data of the atlas → the page rewrite/loaders/ATLAS.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rewrite.loaders.facts import held
from rewrite.loaders.measured import FILE
from rewrite.loaders.versions import RUNS

Json = Mapping[str, Any]
_HEAD = """# The atlas: which layers engines fuse
Printed by `scripts/evidence.sh atlas --page` from [atlas.json](../quantization/atlas.json), which
`scripts/evidence.sh atlas` extracts from the engines' own Python files by their syntax trees:
[how](../../scripts/evidence/atlas/README.md).

- **run**: the engine was run with the family (see [versions.py](versions.py)). Predictions are held against the record.
- **run: ...**: small checkpoints of the family were loaded in these forms, `scripts/evidence.sh try_families`, and
  [measured.json](measured.json) has what was seen. `inspect` claims something of these, and of what is made of their
  parts. `not as its rules say`: of these it says "not known", and what was seen.
- **source**: the engine's source says what it fuses; it was not run: `inspect` says "not known".
- Anything else is "not known". `--groups all` covers the layers of this page, whether anybody ran them or not.

`a = b + c`: the engine joins the stored modules b and c, in this order, to the layer a. `experts`: gate and up of each
expert are joined; `experts (no gate)`: they are not. `text_config`: the language model is that of another line.

"""


def page(data: Json, not_seen: Json) -> str:
    """Counts, a line for each family and engine, and what was not seen."""
    return _HEAD + "".join(
        f"{line}\n" for line in [*_counts(data, not_seen), "", *_families(data), "", *_missing(not_seen)]
    )


def _counts(data: Json, not_seen: Json) -> Iterator[str]:
    yield "| engine | families | with fused layers or a language model | run | small ones run | not seen in full |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for release, families in data["families"].items():
        models = [data["models"][number] for number, _ in families.values()]
        said = sum(bool(model["layers"] or model.get("inner")) for model in models)
        run = sum(_was_run(release, name, data) for name in families)
        small = [name for name in families if _measured(release, name).startswith("run")]
        yield f"| {release} | {len(families)} | {said} | {run} | {len(small)} | {len(not_seen[release])} |"


def _families(data: Json) -> Iterator[str]:
    """Releases of an engine that say the same share a line."""
    yield "## Families"
    yield "| architecture | model_type | engine | fused | how known | source file |"
    yield "| --- | --- | --- | --- | --- | --- |"
    types: dict[str, list[str]] = {}
    for model_type, architecture in data["model_types"].items():
        types.setdefault(architecture, []).append(model_type)
    for name in sorted({name for families in data["families"].values() for name in families}, key=_without_case):
        lines: dict[tuple[str, str, str], list[str]] = {}
        for release, families in data["families"].items():
            if name in families:
                number, file = families[name]
                how = "run" if _was_run(release, name, data) else _measured(release, name)
                lines.setdefault((_fused(data["models"][number]), how, file), []).append(release)
        for (fused, how, file), releases in lines.items():
            known = ", ".join(sorted(types.get(name, [])))
            yield f"| {name} | {known} | {', '.join(releases)} | {fused} | {how} | {file} |"


def _without_case(name: str) -> tuple[str, str]:
    return name.lower(), name


def _fused(model: Json) -> str:
    layers = [f"`{name} = {' + '.join(parts)}`" for name, parts, *_ in model["layers"]]
    experts = {"experts" if len(names) == 3 else "experts (no gate)" for names in model.get("experts", ())}
    inner = [name or "text_config" for name in model.get("inner", ())]
    return ", ".join([*layers, *sorted(experts), *inner]) or "none seen"


def _was_run(release: str, architecture: str, data: Json) -> bool:
    engine, _, version = release.partition(" ")
    types = {model_type for model_type, name in data["model_types"].items() if name == architecture}
    return any(fact.outcome is None and types & set(fact.applies.families) for fact in held(RUNS, engine, version))


def _measured(release: str, architecture: str) -> str:
    """The forms in which small checkpoints were loaded."""
    cells = json.loads(FILE.read_text())["engines"].get(release, {}).get(architecture, ())
    alike = dict.fromkeys(cell["scheme"] for cell in cells if "said" not in cell)
    unlike = dict.fromkeys(cell["scheme"] for cell in cells if "said" in cell)
    said = [f"run: {'; '.join(alike)}"] if alike else []
    said += [f"not as its rules say: {'; '.join(unlike)}"] if unlike else []
    return ". ".join(said) or "source"


def _missing(not_seen: Json) -> Iterator[str]:
    yield "## Not seen"
    yield "What is computed, by file and line of code, or of a form that is not read. It is never guessed."
    for release, families in not_seen.items():
        yield f"### {release}"
        yield from (
            f"- {name}: {'; '.join(_plain(why) for why in reasons)}" for name, reasons in sorted(families.items())
        )


def _plain(text: str) -> str:
    return f"`{' '.join(text.replace('`', '').split())[:160]}`"
