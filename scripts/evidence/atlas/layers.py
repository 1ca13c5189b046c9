"""A model's class → the layers that the engine fuses in it: from the tables by which its weights are loaded, the layers
that its classes make, and those of every class that it uses.

A table is known by its form, whatever its name is: rows ``(fused, stored, slot)`` of texts, or
``{stored: (fused, slot)}``. What is computed is not seen, and is listed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from atlas.source import Class, Definition, Named, Package, find_class, find_definition

#: Tables of other things than the slots of a layer: of names for another quantization, of experts.
_OTHER_TABLES = ("bitsandbytes", "expert", "lora")
_SLOTS = {"q": 0, "k": 1, "v": 2}
_EXPERT_NAMES = ("ckpt_gate_proj_name", "ckpt_down_proj_name", "ckpt_up_proj_name")
_KINDS = (  # of a class of layers, by its name; the first counts
    ("QKV", "qkv"),
    ("MergedReplicated", "replicated"),
    ("Merged", "merged"),
    ("Replicated", "replicated"),
    ("RowParallel", "row"),
    ("ColumnParallel", "column"),
)
_TURNS = (
    *("view", "reshape", "transpose", "permute", "chunk", "split"),
    *("narrow", "t", "flatten", "index_select", "repeat"),
)
_INNER = (
    *("init_vllm_registered_model", "get_model_loader_for"),
    *("init_sglang_registered_model", "_get_sgl_model_cls"),
)


@dataclass(frozen=True, order=True)
class Row:
    """A stored module and the slot that it has in a fused layer. Names may begin with the parent's: ``mlp.up_proj``."""

    fused: str
    slot: tuple[int, ...]
    stored: str


@dataclass
class Found:
    """What the classes of a model say."""

    rows: dict[Row, None] = field(default_factory=dict)  # in the order of the source
    kinds: dict[str, set[str]] = field(default_factory=dict)  # of the attributes that are linear layers
    experts: set[tuple[str, ...]] = field(default_factory=set)  # gate, up, down; without a gate: up, down
    packed: dict[str, list[str]] = field(default_factory=dict)  # what the engine tells the quantization
    prefixes: dict[str, str] = field(default_factory=dict)  # of stored names, and what they become
    inside: dict[str, str] = field(default_factory=dict)  # other parts of stored names, and what they become
    inner: set[str] = field(default_factory=set)  # the language model is one of its own: its name, or "" by text_config
    alters: set[str] = field(default_factory=set)  # functions that cut or turn a tensor before it is loaded
    unseen: dict[str, None] = field(default_factory=dict)  # what is computed

    def add(self, other: Found) -> None:
        self.rows.update(other.rows)
        for name, kinds in other.kinds.items():
            self.kinds.setdefault(name, set()).update(kinds)
        self.experts |= other.experts
        for name, parts in other.packed.items():
            self.packed.setdefault(name, parts)
        self.inner |= other.inner
        self.alters |= other.alters
        self.unseen.update(other.unseen)


class Reader:
    """Reads models of a package. Each definition is read once."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self._read: dict[Named, tuple[Found, dict[Named, Definition]]] = {}

    def read_model(self, model: Class) -> Found:
        """All that is reached from the class of a model: its methods and values, and every class, function and value
        that these name."""
        found = Found()
        _add_attributes(self.package, model, found)
        waiting: dict[Named, Definition] = {model.named: model.node}
        seen: set[Named] = set()
        while waiting:
            named, node = waiting.popitem()
            if named in seen:
                continue
            seen.add(named)
            own, names = self._definition(named, node)
            found.add(own)
            waiting.update(names)
        return found

    def _definition(self, named: Named, node: Definition) -> tuple[Found, dict[Named, Definition]]:
        if named not in self._read:
            found = Found()
            names: dict[Named, Definition] = {}
            for where, part in _parts(self.package, named, node):
                _Visitor(self.package, where, found).visit(part)
                names.update(_names(self.package, where.module, part))
            self._read[named] = found, names
        return self._read[named]


def _add_attributes(package: Package, model: Class, found: Found) -> None:
    """What the engine tells the quantization of the model: the first of each in the order of inheritance."""
    for name in ("packed_modules_mapping", "hf_to_vllm_mapper"):
        owner = next((each for each in model.order if name in each.attributes), None)
        if owner is None:
            continue
        if name == "hf_to_vllm_mapper":
            _add_mapper(package, owner, owner.attributes[name], found)
        else:
            found.packed.update(_packed(package, owner, owner.attributes[name], found))


def _parts(package: Package, named: Named, node: Definition) -> Iterator[tuple[Named, ast.AST]]:
    if not isinstance(node, ast.ClassDef):
        yield named, node
        return
    found = Class(package, named, node)
    set_before: set[str] = set()
    for each in found.order:
        for name, value in each.attributes.items():
            if name not in set_before:
                yield each.named, ast.Assign([ast.Name(name)], value)
        set_before |= each.attributes.keys()
    yield from ((each.named, method) for each, method in found.used_methods())


def _names(package: Package, module: str, node: ast.AST) -> Iterator[tuple[Named, Definition]]:
    """What a definition names of the model: what all models share is not followed."""
    for each in ast.walk(node):
        if isinstance(each, ast.Name | ast.Attribute):
            found = find_definition(package, module, each)
            if found is None and isinstance(each, ast.Attribute) and isinstance(each.value, ast.Name):
                found = find_definition(package, module, each.value)
            if found is not None and _is_of_models(found[0].module):
                yield found


def _is_of_models(module: str) -> bool:
    shared = module.rpartition(".")[2] in ("utils", "interfaces", "interfaces_base", "registry", "adapters")
    return not shared and any(part in f"{module}." for part in (".models.", ".layers.mamba.", ".layers.mla."))


@dataclass
class _Visitor(ast.NodeVisitor):
    package: Package
    where: Named
    found: Found
    _locals: dict[str, ast.expr] = field(default_factory=dict)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Of the model's own functions: those of the shared classes of layers are the same for all."""
        own = ".layers." not in self.where.module and not node.name.startswith("get_")
        is_loading = own and any(word in node.name for word in ("load", "permute", "weight"))
        if is_loading and any(_alters(each) for each in ast.walk(node)):
            self.found.alters.add(f"{self.where.name}.{node.name}")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assigned(node.targets, node.value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self._assigned([node.target], node.value)

    def _assigned(self, targets: list[ast.expr], value: ast.expr) -> None:
        for target in targets:
            if isinstance(target, ast.Name):
                self._locals[target.id] = value
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                self._made(target.attr, value)
            if isinstance(target, ast.Subscript) and _last_name(target.value) == "packed_modules_mapping":
                name, parts = _literal(target.slice), _literal(value)
                if isinstance(name, str) and isinstance(parts, list):
                    self.found.packed.setdefault(name, parts)
        names = [_last_name(target) for target in targets]
        if not any(other in name.lower() for name in names for other in _OTHER_TABLES):
            self.visit(value)
        else:
            self._only_calls(value)

    def _only_calls(self, value: ast.expr) -> None:
        for each in ast.walk(value):
            if isinstance(each, ast.Call):
                self._called(each)

    def _made(self, attribute: str, value: ast.expr) -> None:
        """``self.qkv_proj = QKVParallelLinear(…)``, directly, by a name or under a condition."""
        for each in ast.walk(value):
            if isinstance(each, ast.Call):
                called: ast.expr = each.func
                local = self._locals.get(called.id) if isinstance(called, ast.Name) else None
                options = [called, *([local] if local is not None else [])]
                for named in (n for o in options for n in ast.walk(o) if isinstance(n, ast.Name | ast.Attribute)):
                    if "Linear" in _last_name(named):
                        self.found.kinds.setdefault(attribute, set()).add(self._kind(named))

    def _kind(self, named: ast.Name | ast.Attribute) -> str:
        """Of a class of layers: by its name, or by one that it inherits from."""
        made = find_class(self.package, self.where.module, named)
        names = [_last_name(named), *(each.named.name for each in (made.order if made else ()))]
        return next((kind for name in names for part, kind in _KINDS if part in name), _last_name(named))

    def visit_Tuple(self, node: ast.Tuple) -> None:
        row = _row(node)
        if row is not None:
            self.found.rows.setdefault(row)
        elif len(node.elts) == 3 and _is_computed_row(node):
            self.found.unseen.setdefault(f"{self._file}: {ast.unparse(node)}")
        self.generic_visit(node)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            stored = _literal(key)
            if isinstance(stored, str) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                row = _row(ast.Tuple([value.elts[0], ast.Constant(stored), value.elts[1]]))
                if row is not None:
                    self.found.rows.setdefault(row)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._called(node)
        self.generic_visit(node)

    def _called(self, node: ast.Call) -> None:
        name = _last_name(node.func)
        keywords = {word.arg: word.value for word in node.keywords if word.arg}
        if name in _INNER:
            stated = _literal(keywords.get("architectures"))
            self.found.inner.update(map(str, stated) if isinstance(stated, list) else [""])
        elif name.endswith("make_expert_params_mapping"):
            given = [*node.args[:3]] if len(node.args) >= 3 and "model" not in name else []
            values = [keywords.get(key) for key in _EXPERT_NAMES]
            self._experts([_literal(v) for v in (given if not any(values) and given else values)], node)
        elif name in ("FusedMoEFactory", "SharedFusedMoEFactory"):
            value = keywords.get("ckpt_names") or self._default(node.func, "ckpt_names")
            names = _literal(value)
            self._experts(list(names) if isinstance(names, list) else [None], node)

    def _default(self, called: ast.expr, argument: str) -> ast.expr | None:
        found = find_definition(self.package, self.where.module, called)
        if found is None or not isinstance(found[1], ast.FunctionDef):
            return None
        arguments = found[1].args
        both = [*arguments.posonlyargs, *arguments.args]
        defaults = dict(
            zip([a.arg for a in both[len(both) - len(arguments.defaults) :]], arguments.defaults, strict=True)
        )
        defaults.update({a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d})
        return defaults.get(argument)

    def _experts(self, names: list[object], node: ast.Call) -> None:
        if len(names) == 3 and all(isinstance(name, str) or name is None for name in names) and names[0] and names[1]:
            gate, down, up = (str(name or "") for name in names)
            self.found.experts.add((gate, up, down) if up else (gate, down))
        else:
            self.found.unseen.setdefault(f"{self._file}: experts of {ast.unparse(node.func)}, line {node.lineno}")

    @property
    def _file(self) -> str:
        return _short(self.package, self.where)


def _alters(node: ast.AST) -> bool:
    """``loaded_weight.view(…)``, ``torch.cat(…)``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    root: ast.AST = node.func.value
    while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
        root = root.func if isinstance(root, ast.Call) else root.value
    of_torch = _last_name(root) == "torch" and node.func.attr in ("cat", "stack", "concat", "chunk", "split")
    return of_torch or (node.func.attr in _TURNS and "weight" in _last_name(root) and root is not node.func)


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _row(node: ast.Tuple) -> Row | None:
    """``(fused, stored, slot)``."""
    if len(node.elts) != 3:
        return None
    fused, stored, slot = (_literal(each) for each in node.elts)
    if not (isinstance(fused, str) and isinstance(stored, str)) or isinstance(slot, bool):
        return None
    slots = slot if isinstance(slot, list) else [slot]
    numbers = [_SLOTS.get(each) if isinstance(each, str) else each for each in slots]
    if not numbers or not all(isinstance(each, int) for each in numbers):
        return None
    return Row(fused.strip("."), tuple(each for each in numbers if isinstance(each, int)), stored.strip("."))


def _is_computed_row(node: ast.Tuple) -> bool:
    """Two texts, one of them put together, and a slot."""
    first, second, slot = node.elts
    texts = all(isinstance(each, ast.JoinedStr) or isinstance(_literal(each), str) for each in (first, second))
    value = _literal(slot)
    return texts and (value in _SLOTS if isinstance(value, str) else type(value) is int)


def _literal(node: ast.expr | None) -> object:
    """The value of texts, numbers, lists and dictionaries of them; None for all else. Tuples are lists."""
    if node is None:
        return None
    try:
        value: object = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None
    return list(value) if isinstance(value, tuple) else value


def _packed(package: Package, owner: Class, value: ast.expr, found: Found) -> dict[str, list[str]]:
    """``packed_modules_mapping``: a dictionary, that of another class, or several put together."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        both = (_packed(package, owner, each, found) for each in (value.left, value.right))
        return {name: parts for each in both for name, parts in each.items()}
    if isinstance(value, ast.Dict):
        known: dict[str, list[str]] = {}
        for key, part in zip(value.keys, value.values, strict=True):
            name, parts = _literal(key), _literal(part)
            if key is None:
                known.update(_packed(package, owner, part, found))
            elif isinstance(name, str) and isinstance(parts, list):
                known[name] = [str(each) for each in parts]
            else:
                found.unseen.setdefault(f"{_short(package, owner.named)}: packed_modules_mapping of {name}")
        return known
    other = _attribute(package, owner, value, "packed_modules_mapping")
    if other is not None:
        return _packed(package, *other, found)
    found.unseen.setdefault(f"{_short(package, owner.named)}: packed_modules_mapping")
    return {}


def _add_mapper(package: Package, owner: Class, value: ast.expr, found: Found) -> None:
    """``hf_to_vllm_mapper``, likewise."""
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        _add_mapper(package, owner, value.left, found)
        _add_mapper(package, owner, value.right, found)
        return
    if isinstance(value, ast.Call) and _last_name(value.func) == "WeightsMapper":
        for word in value.keywords:
            pairs = _literal(word.value)
            if word.arg in ("orig_to_new_prefix", "orig_to_new_substr") and isinstance(pairs, dict):
                into = found.prefixes if word.arg == "orig_to_new_prefix" else found.inside
                into.update({str(old): str(new or "") for old, new in pairs.items()})
            elif word.arg != "orig_to_new_stacked":
                found.unseen.setdefault(f"{_short(package, owner.named)}: {word.arg} of hf_to_vllm_mapper")
        return
    other = _attribute(package, owner, value, "hf_to_vllm_mapper")
    if other is not None:
        _add_mapper(package, *other, found)
    else:
        found.unseen.setdefault(f"{_short(package, owner.named)}: hf_to_vllm_mapper")


def _attribute(package: Package, owner: Class, value: ast.expr, name: str) -> tuple[Class, ast.expr] | None:
    """The value of ``Other.name``, and whose it is."""
    if not isinstance(value, ast.Attribute) or value.attr != name:
        return None
    other = find_class(package, owner.named.module, value.value)
    order = other.order if other else ()
    return next(((each, each.attributes[name]) for each in order if name in each.attributes), None)


def _short(package: Package, named: Named) -> str:
    return package.file(named.module).rpartition("models/")[2]
