"""Check 1: OUT is a sound checkpoint of the same tensors, and its config fits them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace

from safetensors import safe_open

from rewrite.checkpoint.checkpoint import INDEX_NAME, Checkpoint, Shard
from rewrite.checkpoint.header import TensorInfo
from rewrite.errors import Refused, RewriteError
from rewrite.quantization.dtypes import FP8_DTYPES, PLAIN_DTYPES
from rewrite.quantization.groups import FusedGroup, find_groups
from rewrite.verification.configs import (
    QUANT_FILE_NAME,
    CompressedTensorsSchemes,
    OtherSchemes,
    QuarkSchemes,
    Schemes,
    quantization_of,
    read_schemes,
    stated_by,
    states_kv_cache,
)
from rewrite.verification.expected import Expected, has_blocks, is_block, is_kv_scale
from rewrite.verification.record import record_problems
from rewrite.verification.result import Check, judge
from rewrite.verification.stated import stated_problems
from rewrite.wording import count


def check_structure(source: Checkpoint, out: Checkpoint, expected: Expected, *, configs: bool) -> Check:
    """Stock reader, same tensors in the same shards, ``total_size``, and, with ``configs``, a config that fits the
    tensors.

    That index and headers of OUT agree both ways is checked by opening it.
    """
    problems = [
        *_stock_reader(out),
        *_same_tensors(source, out, expected),
        *_total_size(source, out),
        *_unrepaired(out, expected),
        *record_problems(source, out, expected),
        *_stated(source, out, expected),
        *(_config(source, out, expected) if configs else ()),
        *_kv_cache(source, out, expected),
        *(_quantization_left(out) if expected.promise.nothing_quantized else ()),
    ]
    agree = "index, headers and config agree" if configs else "index and headers agree"
    summary = f"{count(len(out.shards), 'shard')}, {count(len(out.tensors), 'tensor')}; {agree}"
    return judge("structure", problems, summary, "" if configs else "what the config says of layers")


def _stock_reader(out: Checkpoint) -> Iterator[str]:
    """safetensors' own reader sees the tensors that we see.

    It reads from paths only: it gets the header of each shard in a sparse file of the shard's size.
    """
    for shard in out.shards.values():
        with tempfile.NamedTemporaryFile() as copy, out.storage.open(shard.name) as stored:
            copy.write(stored.read(0, shard.header.size))
            copy.truncate(stored.file_id.size)
            copy.flush()
            yield from _seen_by_stock_reader(shard, copy.name)


def _seen_by_stock_reader(shard: Shard, path: str) -> Iterator[str]:
    try:
        with safe_open(path, framework="numpy") as file:
            stock = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            seen = {name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in stock.items()}
    except Exception as error:  # whatever the stock reader raises is the finding
        yield f"{shard.name}: the stock reader refuses it: {error}"
        return
    if seen != {info.name: (info.dtype, info.shape) for info in shard.header.tensors}:
        yield f"{shard.name}: the stock reader sees other tensors"


def _same_tensors(source: Checkpoint, out: Checkpoint, expected: Expected) -> Iterator[str]:
    for name in sorted(out.tensors.keys() - source.tensors.keys() - set(expected.renamed.values())):
        yield f"{name}: not in the source"
    for name, old in source.tensors.items():
        new = out.tensors.get(expected.renamed.get(name, name))
        if new is None:
            if not expected.allows(old, None):
                yield f"{name}: missing"
            continue
        if old.shard != new.shard:
            yield f"{name}: moved from {old.shard} to {new.shard}"
        if not expected.allows(old, new):
            yield f"{name}: {old.dtype} {list(old.shape)} became {new.dtype} {list(new.shape)}"


def _unrepaired(out: Checkpoint, expected: Expected) -> Iterator[str]:
    left = expected.unrepaired(out)
    if left and len(left) == len(expected.required):
        more = f"{left[0]} and {len(left) - 1} more are what they were"
        yield f"nothing was repaired: {more}, profile {expected.profile} changes them"
        return
    changes = f"is what it was in IN, profile {expected.profile} changes it"
    yield from (f"{name}: {changes}" for name in left if name in out.tensors)


def _total_size(source: Checkpoint, out: Checkpoint) -> Iterator[str]:
    """What the index says of OUT. Where OUT is a copy, a wrong number of IN's comes along: no fault of OUT's."""
    metadata = _metadata(out)
    actual, before = (sum(shard.header.data_bytes for shard in c.shards.values()) for c in (out, source))
    copied = actual == before and metadata == _metadata(source)
    if "total_size" in metadata and metadata["total_size"] != actual and not copied:
        yield f"{INDEX_NAME}: total_size is {metadata['total_size']}, the tensors take {actual} bytes"


def _metadata(checkpoint: Checkpoint) -> dict[str, object]:
    found = checkpoint.index.value.get("metadata") if checkpoint.index else None
    return found if isinstance(found, dict) else {}


def _stated(source: Checkpoint, out: Checkpoint, expected: Expected) -> list[str]:
    try:
        return list(stated_problems(source, out, expected))
    except RewriteError as error:
        return [f"{error.where}: {error.what}"]


def _config(source: Checkpoint, out: Checkpoint, expected: Expected) -> Iterator[str]:
    """Every module has the scheme of its tensors; the ones that were not converted have the scheme they had."""
    try:
        old, new = read_schemes(source), read_schemes(out)
        yield from _same_schemes("config.json", old, new, out, expected)
        if (stated := _stated_by_quant_file(source)) and (file := out.read_json(QUANT_FILE_NAME)):
            found = OtherSchemes(stated_by(file))
            yield from _same_schemes(QUANT_FILE_NAME, stated, found, out, expected)
    except RewriteError as error:
        yield f"{error.where}: {error.what}"
        return
    known = {problem for name, info in _matrices(source) for problem in _module_scheme(name, info, source, old)}
    for name, info in _matrices(out):
        # What IN's config says of a module that stays is no fault of OUT's.
        yield from (problem for problem in _module_scheme(name, info, out, new) if problem not in known)
    if isinstance(new, CompressedTensorsSchemes):
        for group in _fused(source, expected):
            if not _misread(group, source, old):
                yield from _fused_scheme(group, out, new)


def _fused(source: Checkpoint, expected: Expected) -> Iterator[FusedGroup]:
    """The layers that engines fuse: converted ones, FP8 ones, and plain ones, which must stay so."""
    yield from expected.groups
    converted = {group.name for group in expected.groups}
    for group in find_groups(source).whole:
        fp8 = all(module.fp8 and module.scale for module in group.modules) and not has_blocks(group)
        if group.name not in converted and (fp8 or all(module.plain for module in group.modules)):
            yield group


def _kv_cache(source: Checkpoint, out: Checkpoint, expected: Expected) -> Iterator[str]:
    """Dropped scales are gone, and the configs follow. Whether one is missing that must be there is asked elsewhere."""
    if expected.kv_dropped:
        yield from (f"{name}: the manifest says that it was dropped" for name in out.tensors if is_kv_scale(name))
    try:
        stated = [states_kv_cache(quantization_of(checkpoint)) for checkpoint in (source, out)]
        file = out.read_json(QUANT_FILE_NAME)
        beside = file is not None and states_kv_cache(file.value.get("quantization"))
    except RewriteError:
        return  # what is wrong with the config is said already
    if stated[1] != (stated[0] and not expected.kv_dropped):
        yield f"config.json: {'still' if stated[1] else 'no longer'} states a quantized KV cache"
    if beside and expected.kv_dropped:
        yield f"{QUANT_FILE_NAME}: still states a quantized KV cache"


def _quantization_left(out: Checkpoint) -> Iterator[str]:
    """What is still quantized, or says that something is."""
    try:
        if quantization_of(out):
            yield "config.json: still states a quantization"
    except RewriteError as error:
        yield f"{error.where}: {error.what}"
    for name, info in out.tensors.items():
        if info.dtype.startswith(("F4", "F6", "F8")) or name.endswith(_NEEDS_A_CONFIG) or is_kv_scale(name):
            yield f"{name}: {info.dtype} {list(info.shape)} is left of the quantization"


_NEEDS_A_CONFIG = (".weight_scale", ".weight_scale_inv", ".input_scale", ".weight_packed", ".weight_scale_2")


def _stated_by_quant_file(source: Checkpoint) -> OtherSchemes | None:
    """What ModelOpt's own file says, where it says something. One that says nothing is no fault of OUT's."""
    try:
        file = source.read_json(QUANT_FILE_NAME)
        return OtherSchemes(stated_by(file)) if file else None
    except Refused:
        return None


def _matrices(out: Checkpoint) -> Iterator[tuple[str, TensorInfo]]:
    """Whatever may be a linear layer, by its module's name; packed ones, too."""
    for name, info in out.tensors.items():
        if name.endswith((".weight", ".weight_packed")) and len(info.shape) == 2:
            yield name.rpartition(".")[0], info


def _same_schemes(where: str, old: Schemes, new: Schemes, out: Checkpoint, expected: Expected) -> Iterator[str]:
    """What was not converted has the scheme it had; what was dequantized has none."""
    converted = {module.name for group in expected.groups for module in group.modules}
    for module, info in _matrices(out):
        if module not in converted:
            alike = _ignored_alike if info.dtype in PLAIN_DTYPES else _alike
            if not alike(old, new, module):
                yield f"{where}: {module} has another scheme than in the source"
        elif info.dtype in PLAIN_DTYPES:
            if new.of_module(module) is not None:
                yield f"{where}: {module} has a scheme, its weight is {info.dtype}"
        elif problem := _other_activations(old, new, module, expected):
            yield f"{where}: {module} {problem}"


def _other_activations(old: Schemes, new: Schemes, module: str, expected: Expected) -> str | None:
    """A converted layer keeps its activations as they were; where the profile drops an ``input_scale``, they may get a
    scale for each token. Plain ones stay plain. Whether an ``input_scale`` is stored is for ``_module_scheme``."""
    before, after = old.of_module(module), new.of_module(module)
    if before is None or after is None:
        return None
    allowed = {before.activations}
    if expected.promise.input_scale == "dropped" and before.activations != "none":
        allowed.add("token")
    if type(old) is not type(new) and before.activations in ("dynamic", "token"):  # dialects differ in what they say
        allowed |= {"dynamic", "token"}
    return (
        None
        if after.activations in allowed
        else f"has activations {after.activations}, not {' or '.join(sorted(allowed))}"
    )


def _alike(old: Schemes, new: Schemes, module: str) -> bool:
    if isinstance(old, CompressedTensorsSchemes) and isinstance(new, CompressedTensorsSchemes):
        return old.stated(module) == new.stated(module)
    before, after = old.of_module(module), new.of_module(module)
    if before is None or after is None:
        return before is after
    kinds = {before.activations, after.activations}  # dialects differ in what they say of scales made on the way
    return replace(before, activations=after.activations) == after and (
        len(kinds) == 1 or kinds == {"dynamic", "token"}
    )


def _ignored_alike(old: Schemes, new: Schemes, module: str) -> bool:
    """A layer that is not quantized must not become so. (Whether it is a linear layer at all cannot be seen here.)"""
    return old.of_module(module) is not None or new.of_module(module) is None


def _module_scheme(module: str, weight: TensorInfo, out: Checkpoint, new: Schemes) -> Iterator[str]:
    scale = out.tensors.get(f"{module}.weight_scale")
    if scale is None:
        return
    if weight.dtype in PLAIN_DTYPES:
        yield f"{module}.weight_scale: a scale beside a {weight.dtype} weight"
        return
    if weight.dtype not in FP8_DTYPES:
        return  # another format, with scales of its own
    found = new.of_module(module)
    if found is None:
        if not isinstance(new, OtherSchemes):
            yield f"config.json: {module} has no scheme, its scale {list(scale.shape)} says otherwise"
        return
    if not found.fp8:
        yield f"config.json: {module} has another format than FP8, its weight is {weight.dtype}"
    by_row = isinstance(new, QuarkSchemes) and scale.shape == weight.shape[:1]  # Quark has no second dimension
    stored = "channel" if by_row and found.strategy == "channel" else _strategy(scale.shape, weight.shape)
    if found.strategy != stored:
        yield f"config.json: {module} has strategy {found.strategy}, its scale {list(scale.shape)} is {stored}"
    if found.static != (f"{module}.input_scale" in out.tensors):
        kind, stored = ("static", "no input_scale") if found.static else ("dynamic", "an input_scale")
        yield f"config.json: {module} has {kind} activations, and {stored} is stored"


def _strategy(scale: tuple[int, ...], weight: tuple[int, ...]) -> str:
    """How the config must word a scale of this shape. A vector of partitions is worded as ``tensor``."""
    if scale == () or len(scale) == 1:
        return "tensor"
    if scale == (weight[0], 1):
        return "channel"
    return "block" if is_block(scale, weight) else f"of shape {list(scale)}"


def _misread(group: FusedGroup, source: Checkpoint, old: Schemes) -> bool:
    """Whether engines misread the fused layer in IN already: that is no fault of OUT's."""
    if isinstance(old, CompressedTensorsSchemes):
        return any(_fused_scheme(group, source, old))
    return old.of_module(group.modules[0].name) is not None and old.leaves_alone(group.name)


def _fused_scheme(group: FusedGroup, out: Checkpoint, new: CompressedTensorsSchemes) -> Iterator[str]:
    weight = out.tensors.get(group.modules[0].weight.name)
    scale = out.tensors.get(f"{group.modules[0].name}.weight_scale")
    if weight is None:
        return
    found = new.of_fused(group.name, [module.name for module in group.modules])
    stored = None if scale is None else _strategy(scale.shape, weight.shape)
    if (found.strategy if found else None) != stored:
        said = found.strategy if found else "none"
        yield f"config.json: engines give the fused {group.name} strategy {said}, its scales are {stored or 'gone'}"
    elif found is not None and not found.fp8:
        yield f"config.json: engines give the fused {group.name} another format than FP8"
