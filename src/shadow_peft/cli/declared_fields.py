"""The fields of dataclasses of this and of other packages; the latter are read from source, without an import.

Importing TRL's configs takes seconds, since it imports TRL, transformers and torch. Their source names every field.
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DeclaredField:
    """A field from which a parser makes options.

    Args:
        name: name of the field.
        is_true: a boolean that is True by default; the parsers of transformers and TRL add `--no_NAME` for it.
        aliases: further option strings, from the field's metadata.
    """

    name: str
    is_true: bool = False
    aliases: tuple[str, ...] = ()


def fields_of(cls: type) -> list[DeclaredField]:
    """The fields of a dataclass of this package."""
    return [
        DeclaredField(f.name, f.default is True, _strings(f.metadata.get("aliases", ())))
        for f in dataclasses.fields(cls)
        if f.init
    ]


def fields_in_source(package: str, name: str) -> list[DeclaredField]:
    """The fields of the dataclass `name` that a package exports, those of its base classes first.

    Raises:
        LookupError: there is no such package, or following the imports in its source finds no class of that name.
        OSError, ValueError, SyntaxError: a source cannot be found, read or parsed.
    """
    module, node = _find_class(package, name)
    fields: dict[str, DeclaredField] = {}
    for base in reversed(node.bases):
        fields |= {f.name: f for f in fields_in_source(module, ast.unparse(base))}
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        declared = [_declared(item) for item in node.body if isinstance(item, ast.AnnAssign)]
        fields |= {f.name: f for f in declared if f is not None}
    return list(fields.values())


def _find_class(module: str, name: str) -> tuple[str, ast.ClassDef]:
    """The module that defines a class, and the definition; imports are followed, type-checking imports included."""
    path, tree = _source(module)
    for item in tree.body:
        if isinstance(item, ast.ClassDef) and item.name == name:
            return module, item
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]:
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                return _find_class(_absolute(node, package), alias.name)
    raise LookupError(f"{path} neither defines nor imports {name}")


def _source(module: str) -> tuple[Path, ast.Module]:
    """File and syntax tree of a module; the import system is used only to find the folder of its top-level package."""
    package, *parts = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise LookupError(f"there is no package {package}")
    place = Path(spec.submodule_search_locations[0], *parts)
    path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return path, ast.parse(path.read_text(encoding="utf-8"))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from MODULE import ...` names inside a package."""
    if node.level == 0:
        return node.module or ""
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])


def _declared(item: ast.AnnAssign) -> DeclaredField | None:
    """The field that `name: type = value` declares; None if it is no argument of the constructor."""
    kind = ast.unparse(item.annotation)
    if not isinstance(item.target, ast.Name) or any(word in kind for word in ("ClassVar", "InitVar", "KW_ONLY")):
        return None
    settings: dict[str, Any] = {"default": item.value}
    if isinstance(item.value, ast.Call):
        settings = {keyword.arg: keyword.value for keyword in item.value.keywords if keyword.arg}
    if _is(settings.get("init"), False):
        return None
    aliases = settings.get("aliases") or _entry(settings.get("metadata"), "aliases")
    is_true = "bool" in kind and _is(settings.get("default"), True)
    return DeclaredField(item.target.id, is_true, _strings(ast.literal_eval(aliases) if aliases else ()))


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _entry(node: ast.expr | None, key: str) -> ast.expr | None:
    """The value of a key of a dictionary display."""
    if not isinstance(node, ast.Dict):
        return None
    pairs = zip(node.keys, node.values, strict=True)
    return next((value for k, value in pairs if isinstance(k, ast.Constant) and k.value == key), None)


def _strings(given: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
