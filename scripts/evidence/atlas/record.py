"""What was read of the models of engines → the data of ``rewrite/quantization/atlas.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from atlas.engines import ENGINES, model_types
from atlas.layers import Found, Reader, Row
from atlas.source import Package

Json = dict[str, Any]


def record(packages: Iterable[tuple[str, str, Path]], transformers: Path) -> Json:
    """``packages``: engine, version and the folder that its package lies in. Models that say the same are one."""
    models: list[Json] = []
    places: dict[str, int] = {}
    families: dict[str, Json] = {}
    not_seen: dict[str, dict[str, list[str]]] = {}
    for engine, version, folder in packages:
        name, read = ENGINES[engine]
        package = Package(folder / name)
        reader = Reader(package)
        key = f"{engine} {version}"
        families[key], not_seen[key] = {}, {}
        for architecture, found_class in read(package):
            if found_class is None:
                not_seen[key][architecture] = ["no class of this name: it is imported from elsewhere, or computed"]
                continue
            if ".models.transformers" in found_class.named.module:
                not_seen[key][architecture] = ["made of transformers' classes, by rules of its own"]
                continue
            model, unseen = model_entry(reader.read_model(found_class))
            text = json.dumps(model, sort_keys=True)
            if places.setdefault(text, len(models)) == len(models):
                models.append(model)
            file = package.file(found_class.named.module).partition("/")[2]
            families[key].setdefault(architecture, [places[text], file])
            if unseen:
                not_seen[key][architecture] = unseen
    served = {name for entries in families.values() for name in entries}
    types = {t: a for t, a in model_types(Package(transformers / "transformers")).items() if a in served}
    return {"models": models, "families": families, "model_types": types, "not_seen": not_seen}


def lines(data: Json) -> str:
    """As JSON with a line for each entry, so that a diff shows what changed."""
    models = ",\n".join(json.dumps(each) for each in data["models"])
    families = ",\n".join(
        f"{json.dumps(engine)}: {{\n"
        + ",\n".join(f"{json.dumps(n)}: {json.dumps(e)}" for n, e in entries.items())
        + "\n}"
        for engine, entries in data["families"].items()
    )
    types = json.dumps(data["model_types"], sort_keys=True)
    return f'{{"models": [\n{models}\n],\n"families": {{\n{families}\n}},\n"model_types": {types}}}\n'


def model_entry(found: Found) -> tuple[Json, list[str]]:
    """A model as data, and what of it was not seen."""
    unseen = list(found.unseen)
    layers = list(_layers(found, unseen))
    entry: Json = {
        "layers": layers,
        "linears": {name: "|".join(sorted(kinds)) for name, kinds in sorted(found.kinds.items())},
        "experts": sorted(list(names) for names in found.experts),
        "packed": sorted(found.packed),
        "prefixes": found.prefixes,
        "inside": found.inside,
        "inner": sorted(found.inner),
        "alters": sorted(found.alters),
        "names_not_seen": any("hf_to_vllm_mapper" in each for each in unseen),
    }
    if not layers and not found.inner:
        unseen.append("no table of parts: nothing is fused, or by code of its own")
    return {name: value for name, value in entry.items() if value or name == "layers"}, unseen


def _layers(found: Found, unseen: list[str]) -> Iterator[list[Any]]:
    """``[name, parts, kind, parents]`` in the order of slots; parents: where the table names them, else all."""
    tables: dict[tuple[str, str], dict[tuple[int, ...], list[str]]] = {}
    for row in found.rows:
        if row.fused != row.stored:
            slots = tables.setdefault(_owner(row), {}).setdefault(row.slot, [])
            slots.append(row.stored.rpartition(".")[2])
    merged: dict[tuple[str, tuple[str, ...]], set[str]] = {}
    for (parent, name), table in tables.items():
        numbers = [number for slot in sorted(table) for number in slot]
        if numbers != list(range(len(numbers))) or len(numbers) < 2:
            unseen.append(f"{name}: slots {numbers} of {', '.join(p for parts in table.values() for p in parts)}")
            continue
        for parts in _variants([list(dict.fromkeys(table[slot])) for slot in sorted(table)]):
            if len(set(parts)) == len(parts):
                merged.setdefault((name, parts), set()).add(parent)
    for name, packed in found.packed.items():  # no table: put together by code
        if len(packed) > 1 and not any(name == known for known, _ in merged):
            merged[name, tuple(packed)] = {""}
    for (name, parts), parents in merged.items():
        several = any(len(slot) > 1 for (_, own), slots in tables.items() if own == name for slot in slots)
        kind = "slots" if several else "|".join(sorted(found.kinds.get(name, ["not seen"])))
        yield [name, list(parts), kind, [] if "" in parents else sorted(parents)]


def _owner(row: Row) -> tuple[str, str]:
    """Parent and name of the fused layer."""
    parent, _, name = row.fused.rpartition(".")
    return parent.rpartition(".")[2], name


def _variants(slots: list[list[str]]) -> Iterator[tuple[str, ...]]:
    """Where slots have several names each, those of one place in the source belong together."""
    count = max(map(len, slots))
    for i in range(count):
        yield tuple(names[min(i, len(names) - 1)] for names in slots)
