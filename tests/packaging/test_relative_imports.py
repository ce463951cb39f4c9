"""Every relative import of the package finds its module and its name: lazy ones and those for types too, which nothing else runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_dp_xattn

PACKAGE = Path(hf_dp_xattn.__file__).parent


def relative_imports(source: str, package: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each `from .module import name`, wherever it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from ((module, alias.name) for alias in node.names)


def names_of_types(path: Path) -> set[str]:
    """What a module has for type checkers alone (`if TYPE_CHECKING:`), by itself or passed on."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for inner in ast.walk(node):
                if isinstance(inner, (ast.Import, ast.ImportFrom)):
                    found |= {alias.asname or alias.name for alias in inner.names}
                elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    found.add(inner.id)
    return found


def missing(source: str, package: str) -> list[str]:
    """What the source imports of the package that is not there."""
    found = []
    for module, name in relative_imports(source, package):
        try:
            there = importlib.import_module(module)
        except ModuleNotFoundError:
            found.append(module)
            continue
        if hasattr(there, name) or name in names_of_types(Path(str(there.__file__))):
            continue
        if importlib.util.find_spec(f"{module}.{name}") is None if hasattr(there, "__path__") else True:
            found.append(f"{module}.{name}")
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_what_is_imported_is_there(file: Path) -> None:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    assert missing(file.read_text(), ".".join(parts[:-1])) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from .nowhere import Ledger", ["hf_dp_xattn.privacy.nowhere"]),
        ("from .ledger import Nothing", ["hf_dp_xattn.privacy.ledger.Nothing"]),
        ("from . import nowhere", ["hf_dp_xattn.privacy.nowhere"]),
        ("from ..hosts.nowhere import x", ["hf_dp_xattn.hosts.nowhere"]),
        ("from ..errors import LedgerError", []),
        ("from . import ledger", []),
    ],
)
def test_what_is_not_there_is_found(line: str, expected: list[str]) -> None:
    lazy = f"from typing import TYPE_CHECKING\ndef f():\n    {line}\nif TYPE_CHECKING:\n    {line}\n"
    assert missing(lazy, "hf_dp_xattn.privacy") == expected * 2
