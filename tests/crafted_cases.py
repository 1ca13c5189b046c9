"""A tiny sound checkpoint, faults to put into it, and the judgement of what rewrite makes of the result.

Shared by the tests and by the fuzzer (``scripts/fuzz``).
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rewrite import PROFILES, SELECTIONS, RewriteError, make_plan, open_checkpoint
from rewrite.inspection.inspection import inspect_model
from rewrite.quantization.model import interpret

CONFIG, INDEX, QUANT_FILE = "config.json", "model.safetensors.index.json", "hf_quant_config.json"
EXTRA_SHARD = "extra.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_LAYER = "model.layers.0."

T = TypeVar("T")

#: What strangers may have put where something else belongs.
WRONG: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**31 + 1, int("9" * 4000), float("nan"), float("inf"), "", "x", "9" * 5000, "a\0b", "a\nb",
    "\ud800", "\x1b[31m", "../x", "/dev/zero", [], [[]], [None], ["re:("], ["re:(a+)+$"], ["re:" + ".*" * 12 + "x"],
    ["re:" + "(" * 3000 + ")" * 3000], ["re:a{4294967295}"], {}, {"a": []}, {"": {}}, ["x"] * 5000, "x" * 100_000,
)  # fmt: skip


def sound() -> dict[str, bytes]:
    """The files of a checkpoint that converts: one fused group, two shards, index."""
    first = {
        f"{_LAYER}linear_attn.in_proj_qkv.weight": ("F8_E4M3", [24, 4], bytes(96)),
        f"{_LAYER}linear_attn.in_proj_qkv.weight_scale": ("F32", [1], struct.pack("<f", 0.5)),
        f"{_LAYER}linear_attn.in_proj_qkv.input_scale": ("F32", [1], struct.pack("<f", 2)),
        f"{_LAYER}linear_attn.in_proj_z.weight": ("F8_E4M3", [8, 4], bytes(32)),
        f"{_LAYER}linear_attn.in_proj_z.input_scale": ("F32", [1], struct.pack("<f", 2)),
    }
    second = {
        f"{_LAYER}linear_attn.in_proj_z.weight_scale": ("F32", [], struct.pack("<f", 0.25)),
        f"{_LAYER}mlp.gate.weight": ("BF16", [4, 4], bytes(32)),
    }
    weight_map = {name: shard for shard, tensors in zip(SHARDS, (first, second), strict=True) for name in tensors}
    group = {"targets": ["Linear"], "weights": FP8, "input_activations": FP8}
    config = {
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_num_value_heads": 2,
        "linear_value_head_dim": 4,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        },
    }
    return {
        CONFIG: json.dumps(config, indent=2).encode(),
        INDEX: json.dumps({"metadata": {"total_size": 999}, "weight_map": weight_map}).encode(),
        SHARDS[0]: shard(first),
        SHARDS[1]: shard(second),
        "tokenizer.json": b"{}",
    }


_MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*mlp.gate*"]}
_MIXED = {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        f"{_LAYER}{name}": {"quant_algo": "NVFP4" if "mlp" in name else "FP8"}
        for name in (
            *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "mlp.up_proj"),
            *(f"self_attn.{part}_proj" for part in "qkv"),
        )
    },
}
#: What a config states; of ModelOpt's also what hf_quant_config.json does.
DIALECTS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head", f"{_LAYER}mlp.gate"]},
    "modelopt": {"quant_method": "modelopt", **_MODELOPT},
    "mixed": {"quant_method": "modelopt", **_MIXED, "config_groups": {"a": {"targets": [f"{_LAYER}mlp.up_proj"]}}},
}


def sound_in(dialect: str) -> dict[str, bytes]:
    """The same in another dialect, with attention, scales of a KV cache and a layer of another format."""
    files = sound()
    third = {
        f"{_LAYER}self_attn.{part}_proj.{kind}": tensor
        for part, rows in (("q", 8), ("k", 4), ("v", 4))
        for kind, tensor in (
            ("weight", ("F8_E4M3", [rows, 4], bytes(4 * rows))),
            ("weight_scale", ("F32", [], struct.pack("<f", 1 / rows))),
            ("input_scale", ("F32", [], struct.pack("<f", 2))),
            (f"{part}_scale", ("F32", [], struct.pack("<f", 0.5))),
        )
    }
    if dialect == "mixed":
        third[f"{_LAYER}mlp.up_proj.weight"] = ("U8", [8, 2], bytes(16))
        third[f"{_LAYER}mlp.gate_proj.weight"] = ("U8", [8, 2], bytes(16))
    config, index = json.loads(files[CONFIG]), json.loads(files[INDEX])
    config |= {"quantization_config": DIALECTS[dialect], "num_attention_heads": 2, "num_key_value_heads": 1}
    index["weight_map"] |= dict.fromkeys(third, EXTRA_SHARD)
    files |= {CONFIG: json.dumps(config).encode(), INDEX: json.dumps(index).encode(), EXTRA_SHARD: shard(third)}
    if dialect != "fp8":
        stated = {"modelopt": _MODELOPT, "mixed": _MIXED}[dialect]
        files[QUANT_FILE] = json.dumps({"producer": {"name": "modelopt"}, "quantization": stated}).encode()
    return files


def shard(tensors: dict[str, tuple[str, list[int], bytes]], **extra: Any) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return file_of(json.dumps({**header, **extra}).encode(), data)


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write(files: dict[str, bytes], directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)


def judge(directory: Path) -> str:
    """What becomes of it by default, as far as reading goes. Raises whatever is neither a result nor an error of ours,
    also of every other profile."""
    refused, checkpoint = _refused(lambda: open_checkpoint(directory))
    if checkpoint is None:
        return refused
    inspected = [_refused(partial(_inspect, checkpoint, selection))[0] for selection in SELECTIONS]
    plans = [partial(make_plan, checkpoint, profile, selection) for selection in SELECTIONS for profile in PROFILES]
    planned = [_refused(plan)[0] for plan in plans]
    return next((outcome for outcome in (inspected[0], planned[0]) if outcome != "accepted"), "accepted")


def _inspect(checkpoint: Any, selection: Any) -> Any:
    return inspect_model(interpret(checkpoint), selection)


def _refused(work: Callable[[], T]) -> tuple[str, T | None]:
    """How it ended, and the result if there is one."""
    try:
        return "accepted", work()
    except RewriteError as error:
        if error.exit_code not in (3, 4) or not error.where or "\x1b" in str(error):
            raise AssertionError(f"not what a refusal looks like: {error!r}") from error
        return type(error).__name__, None


def crafted(seed: int, directory: Path) -> None:
    """A sound checkpoint with one to three faults, the same for the same seed."""
    chance = random.Random(seed)
    dialect = chance.choice(("compressed-tensors", "compressed-tensors", *DIALECTS))
    write(sound_in(dialect) if dialect in DIALECTS else sound(), directory)
    for _ in range(chance.randint(1, 3)):
        chance.choice(FAULTS)(directory, chance)


def _fault_config(directory: Path, chance: random.Random) -> None:
    _fault_json(directory / CONFIG, chance)


def _fault_quant_file(directory: Path, chance: random.Random) -> None:
    _fault_json(directory / QUANT_FILE, chance)


def _fault_index(directory: Path, chance: random.Random) -> None:
    _fault_json(directory / INDEX, chance)


def _fault_json(path: Path, chance: random.Random) -> None:
    """Another value at some place of a JSON file."""
    value = _load(_bytes(path))
    places = list(_places(value))
    if places:
        parent, key = chance.choice(places)
        parent[key] = chance.choice(WRONG)
        _put(path, json.dumps(value).encode())


def _fault_header(directory: Path, chance: random.Random) -> None:
    """Another value, name or entry in a header; the data stays."""
    path = directory / chance.choice((*SHARDS, EXTRA_SHARD))
    raw = _bytes(path)
    length = int.from_bytes(raw[:8], "little")
    header = _load(raw[8 : 8 + length])
    places = list(_places(header))
    if not places:
        return
    parent, key = chance.choice(places)
    if isinstance(key, str) and chance.random() < 0.3:
        parent[chance.choice(("", "__metadata__", "a\0b", "a\nb", "\ud800", "n" * 1_000_001, "9" * 5000, "²"))] = (
            parent.pop(key)
        )
    else:
        parent[key] = chance.choice((*WRONG, [2**63, 0], [-1], [4, 2], [0, 2**64], "F33", "F4", [0, 1], [1], "F64"))
    _put(path, file_of(json.dumps(header).encode(), raw[8 + length :]))


def _fault_text(directory: Path, chance: random.Random) -> None:
    """Header text that no JSON writer makes."""
    path = directory / chance.choice(SHARDS)
    entry = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = chance.choice(
        (b"", b"{", b"{}", b"[]", b" {}", b"{} x", b"{}\0", b'{"a":' * 3000, b'{"a":' + b"[" * 3000, b'{"\xff":1}',
         b'{"a":%s,"a":%s}' % (entry, entry), b'{"a":%s,}' % entry, b'{"a":%s' % entry, entry.join([b'{"a":', b"}"]),
         b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,4]}}',
         b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}',
         b'{"__metadata__":{"a":1}}', b'{"__metadata__":{"a":"1","a":"2"}}', b'{"__metadata__":null}', b'{"a":{}}')
    )  # fmt: skip
    length = chance.choice((len(text), len(text), len(text), 0, 7, len(text) + 1, 100_000_001, 2**63, 2**64 - 1))
    _put(path, struct.pack("<Q", length) + text + bytes(chance.choice((0, 4, 4))))


def _fault_bytes(directory: Path, chance: random.Random) -> None:
    """Flipped, cut or added bytes in any file."""
    path = directory / chance.choice((CONFIG, INDEX, *SHARDS))
    raw = bytearray(_bytes(path))
    for _ in range(chance.randint(1, 4)):
        if raw:
            raw[chance.randrange(len(raw))] = chance.choice((*b'{}[]",:\\\0\xff0-', chance.randrange(256)))
    cut = chance.randrange(len(raw) + 1)
    _put(path, chance.choice((raw, raw, raw[:cut], raw + raw[:cut])))


def _fault_file(directory: Path, chance: random.Random) -> None:
    """Something else in the place of a file, or beside it."""
    path = directory / chance.choice(
        (CONFIG, INDEX, *SHARDS, "tokenizer.json", "rewrite_manifest.json", "pipe\n\x1b[31m")
    )
    if path.is_dir() and not path.is_symlink():
        return
    path.unlink(missing_ok=True)
    kind = chance.choice(
        (
            "gone",
            "empty",
            "directory",
            "fifo",
            "dangling",
            "itself",
            "up",
            "/dev/zero",
            "/dev/null",
            "/proc/self/mem",
            "pickle",
        )
    )
    if kind == "empty":
        path.touch()
    elif kind == "directory":
        path.mkdir()
        (path / "inside").touch()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "pickle":
        path.with_name("pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    elif kind != "gone":
        path.symlink_to({"dangling": "gone", "itself": path.name, "up": ".."}.get(kind, kind))


def _fault_undecodable_name(directory: Path, chance: random.Random) -> None:
    """A file whose name is no UTF-8, very long, or with characters that no terminal should see."""
    name = chance.choice((b"\xff\xfe", b"n" * 255, b"a\nb", b"a\x1b[31m", b"a\\b", "\u202e".encode(), b"x.safetensors"))
    Path(os.fsdecode(os.path.join(os.fsencode(directory), name))).touch()  # noqa: PTH118 - bytes


FAULTS: tuple[Callable[[Path, random.Random], None], ...] = (
    _fault_config, _fault_config, _fault_index, _fault_header, _fault_header, _fault_text, _fault_bytes, _fault_file,
    _fault_undecodable_name, _fault_quant_file,
)  # fmt: skip


def _load(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _put(path: Path, content: bytes | bytearray) -> None:
    """Only into what is a file still: an earlier fault may have put a device there."""
    if path.is_file() and not path.is_symlink():
        path.write_bytes(content)


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def _places(value: Any) -> Any:
    """Every (container, key) in a JSON value."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, child in items:
        yield value, key
        yield from _places(child)
