"""Hooks of mkdocs: absent pages leave the navigation; docstrings and the command line's help stand in pages word for word."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_DOCSTRING = re.compile(r"<!-- docstring: ([\w./]+) -->")
_HELP = re.compile(r"<!-- help: (\w*) -->")


def on_config(config: Any) -> Any:
    """Drops pages that are not there: measured pages are written by long runs."""
    config["nav"] = _present(config["nav"], Path(config["docs_dir"]))
    return config


def _present(entries: list[Any], docs: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in entries:
        [(title, target)] = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target, docs)})
        elif (docs / target).is_file():
            kept.append(entry)
    return kept


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts in what the markers name."""
    markdown = _DOCSTRING.sub(lambda m: _details(m[1], docstring(ROOT / m[1])), markdown)
    return _HELP.sub(lambda m: f"```text\n{help_of(m[1])}\n```", markdown)


def docstring(path: Path) -> str:
    """The docstring of a module."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _details(name: str, text: str) -> str:
    """A block that opens on a click; the text is shown as it is, for it is written for a screen of fixed width."""
    body = "\n".join(f"    {line}".rstrip() for line in ["```text", *text.splitlines(), "```"])
    return f'??? note "In full, as it stands in {name}"\n\n{body}\n'


def help_of(command: str) -> str:
    """What `hf-dp-xattn COMMAND --help` prints."""
    from hf_dp_xattn.cli import build_parser

    width = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "110"
    try:
        parser = build_parser()
        if command:
            [subparsers] = parser._subparsers._group_actions  # type: ignore[union-attr]
            parser = subparsers.choices[command]  # type: ignore[index, call-overload]
        return parser.format_help().rstrip()
    finally:
        os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)
