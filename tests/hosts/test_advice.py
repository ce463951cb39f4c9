"""Whoever is told to protect again is told what happens to what was spent."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import hf_dp_xattn

ADVICE = re.compile(r"dpx\.unprotect\b|protect (it |the copy )?(again|anew)|PROTECT_AGAIN", re.IGNORECASE)
TOLD = re.compile(r"STAYS|PROTECT_AGAIN")


def said(node: ast.AST) -> str:
    """A string as it is written, with the names that it puts in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(v.value) if isinstance(v, ast.FormattedValue) else said(v) for v in node.values)
    return node.id if isinstance(node, ast.Name) else ""


def docstrings(tree: ast.AST) -> set[ast.AST]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)} | {
        f.value for f in first if isinstance(f, ast.Expr)
    }


def test_every_message_that_advises_it() -> None:
    root = Path(hf_dp_xattn.__file__).parent
    found = 0
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text())
        inside = {
            part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
        } - {node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        skipped = inside | docstrings(tree)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Constant, ast.JoinedStr)) or node in skipped:
                continue
            text = said(node)
            if ADVICE.search(text):
                found += 1
                assert TOLD.search(text), f"{path.name}: {text[:120]}"
    assert found >= 8
