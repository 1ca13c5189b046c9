"""The Python files of an engine's package, by their syntax trees: names are resolved, nothing is imported or run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.expr  # an expression: the value of a name of the module


@dataclass(frozen=True)
class Named:
    """A definition at the top of a module, by both names."""

    module: str
    name: str


@dataclass(frozen=True, eq=False)
class Module:
    """One file: what it defines, and where its other names come from."""

    name: str
    is_package: bool
    tree: ast.Module
    defined: dict[str, Definition] = field(default_factory=dict)
    imported: dict[str, Named] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for node in _top_level(self.tree.body):
            self._define(node)

    def _define(self, node: ast.stmt) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            self.defined.setdefault(node.name, node)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.defined.setdefault(target.id, node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            self.defined.setdefault(node.target.id, node.value)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.imported.setdefault(alias.asname or alias.name.partition(".")[0], Named(alias.name, ""))
        elif isinstance(node, ast.ImportFrom):
            base = self._base(node)
            for alias in node.names:
                self.imported.setdefault(alias.asname or alias.name, Named(base, alias.name))

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.name.split(".")
        kept = parts[: len(parts) - node.level + self.is_package]
        return ".".join([*kept, *([node.module] if node.module else [])])


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Also what stands under a condition, where that is not another platform than CUDA: of two definitions the first
    counts."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            platform = _platform(node.test) if isinstance(node, ast.If) else None
            if platform in (None, "is_cuda"):
                yield from _top_level(node.body)
            if platform != "is_cuda":
                yield from _top_level(node.orelse)
            for handler in getattr(node, "handlers", []):
                yield from _top_level(handler.body)
        else:
            yield node


def _platform(test: ast.expr) -> str | None:
    """``is_cuda`` of ``current_platform.is_cuda()``."""
    called = test.func if isinstance(test, ast.Call) else None
    name = called.attr if isinstance(called, ast.Attribute) else ""
    return name if name in ("is_cuda", "is_rocm", "is_xpu", "is_cpu", "is_tpu") else None


class Package:
    """A package in the folder ``root``. Files are parsed when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        """None: no such file in this package."""
        if name not in self._modules:
            self._modules[name] = self._parse(name)
        return self._modules[name]

    def _parse(self, name: str) -> Module | None:
        path = self.root.parent / Path(*name.split("."))
        for file, is_package in ((path.with_name(f"{path.name}.py"), False), (path / "__init__.py", True)):
            if file.is_file() and name.split(".", maxsplit=1)[0] == self.root.name:
                return Module(name, is_package, ast.parse(file.read_text(encoding="utf-8")))
        return None

    def file(self, module: str) -> str:
        """Where a module lies, from the folder of the package."""
        path = Path(*module.split("."))
        is_package = (self.root.parent / path / "__init__.py").is_file()
        return str(path / "__init__.py" if is_package else path.with_name(f"{path.name}.py"))

    def resolve(self, module: str, name: str) -> tuple[Named, Definition] | None:
        """What ``name`` is in ``module``, through imports; None for what is not of this package."""
        seen: set[Named] = set()
        wanted = Named(module, name)
        while wanted not in seen:
            seen.add(wanted)
            found = self.module(wanted.module)
            if found is None:
                return None
            if wanted.name in found.defined:
                value = found.defined[wanted.name]
                if not isinstance(value, ast.Name):
                    return wanted, value
                wanted = Named(wanted.module, value.id)  # ``A = B``
            elif wanted.name in found.imported:
                wanted = found.imported[wanted.name]
            else:
                return None
        return None


@dataclass(frozen=True, eq=False)
class Class:
    """A class, with what it inherits within the package."""

    package: Package
    named: Named
    node: ast.ClassDef

    @cached_property
    def order(self) -> tuple[Class, ...]:
        """The class and those that it inherits from; depth first, which is Python's order but for diamonds."""
        found: dict[Named, Class] = {self.named: self}
        for base in self.node.bases:
            parent = find_class(self.package, self.named.module, base)
            if parent is not None and parent.named != self.named:
                found.update({each.named: each for each in parent.order if each.named not in found})
        return tuple(found.values())

    @cached_property
    def attributes(self) -> Mapping[str, ast.expr]:
        """What is set in the body of the class itself."""
        found: dict[str, ast.expr] = {}
        for node in _top_level(self.node.body):
            if isinstance(node, ast.Assign):
                found.update({t.id: node.value for t in node.targets if isinstance(t, ast.Name)})
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found[node.target.id] = node.value
        return found

    @cached_property
    def methods(self) -> Mapping[str, Function]:
        """Of the class itself."""
        found = _top_level(self.node.body)
        return {node.name: node for node in found if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}

    def used_methods(self) -> Iterator[tuple[Class, Function]]:
        """The methods that an object of this class has: the first of each name, and those that it calls by
        ``super()``."""
        for name in dict.fromkeys(name for each in self.order for name in each.methods):
            for each in self.order:
                if name in each.methods:
                    yield each, each.methods[name]
                    if not _calls_super(each.methods[name], name):
                        break


def _calls_super(function: Function, name: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
        for node in ast.walk(function)
    )


def find_class(package: Package, module: str, node: ast.expr) -> Class | None:
    """The class that an expression names, ``A``, ``module.A`` or ``A[int]``."""
    found = find_definition(package, module, node.value if isinstance(node, ast.Subscript) else node)
    return Class(package, found[0], found[1]) if found and isinstance(found[1], ast.ClassDef) else None


def find_definition(package: Package, module: str, node: ast.expr) -> tuple[Named, Definition] | None:
    """What ``A`` or ``module.A`` names, of this package."""
    if isinstance(node, ast.Name):
        return package.resolve(module, node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        here = package.module(module)
        base = here.imported.get(node.value.id) if here else None
        if base is not None:
            return package.resolve(f"{base.module}.{base.name}".rstrip("."), node.attr)
    return None
