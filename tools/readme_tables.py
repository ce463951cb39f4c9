"""Puts the tables that the benchmarks wrote between their markers in README.md, docs/how-it-works.md and docs/library.md, and writes
docs/when.md, the table of where this works, from their numbers: `python tools/readme_tables.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/how-it-works.md", "docs/library.md")
WHEN = "docs/when.md"
BLOCK = re.compile(r"<!-- (docs/\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def filled(page: str) -> str:
    """The text with every marked block replaced by the file it names."""
    return BLOCK.sub(
        lambda m: f"<!-- {m[1]} -->\n{(ROOT / m[1]).read_text().strip()}\n<!-- end {m[1]} -->", page
    )


def when() -> str:
    """What is protected, what is left of it at two epsilons, and the measurement behind it."""
    chat = {
        x["epsilon"]: 100 * sum(x["replies_right"]) / len(x["replies_right"])
        for x in _read("docs/chat/results.json")["lines"]
        if (x["unit"], x["segments"]) == ("group", 150)
    }
    rag = {
        (x["documents"], x["epsilon"]): 100 * x["accuracy"]
        for x in _read("docs/rag/results.json")["lines"]
        if (x["mechanism"], x["unit"]) == ("anchors", "group")
    }
    phrases = _read("docs/library/shapes.json")["conditions"]
    replies = _read("docs/library/replies.json")["kinds"]["about the role"]
    prompts = {
        x["epsilon"]: 100 * x["accuracy"]
        for x in _read("docs/shapes/accuracy.json")["lines"]
        if x["series"] == "context"
    }
    whole = [_better(prompts[f"{e}"], phrases.get(f"whole prompt, epsilon {e}")) for e in (4, 8)]
    rows = [
        (
            "a system prompt of 150 segments: what most of them say",
            "replies right",
            chat[4.0],
            chat[8.0],
            "chat.md",
        ),
        ("256 documents: what most of them state", "answers right", rag[256, 4.0], rag[256, 8.0], "rag.md"),
        ("64 documents", "answers right", rag[64, 4.0], rag[64, 8.0], "rag.md"),
        (
            "the 2 or 3 phrases of a picture's prompt",
            "attributes right",
            _percent(phrases, 4),
            _percent(phrases, 8),
            "library.md",
        ),
        ("a picture's whole prompt as one", "attributes right", *whole, "library.md"),
        (
            "a system prompt of 4 to 10 sentences, SmolLM2",
            "of the prompt's effect on the next word, asked about its role",
            100 * (1 - replies["epsilon 4"]["share"]),
            100 * (1 - replies["epsilon 8"]["share"]),
            "library.md",
        ),
    ]
    head = "| protected, one unit each | what is left | epsilon 4 | epsilon 8 | |\n|---|---|---|---|---|"
    return "\n".join(
        [
            head,
            *(
                f"| {what} | {left} | {_shown(a)} | {_shown(b)} | [how](docs/{page}) |"
                for what, left, a, b, page in rows
            ),
        ]
    )


def _better(anchors: float, library: dict[str, float] | None) -> str | float:
    """The better of two mechanisms, named where it is not the page's."""
    if library is None or anchors > 100 * library["accuracy"]:
        return f"{_shown(anchors)} (anchors)"
    return 100 * library["accuracy"]


def _shown(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.0f} %"


def _percent(conditions: dict[str, Any], epsilon: int) -> float:
    return 100.0 * float(conditions[f"phrases, epsilon {epsilon}"]["accuracy"])


def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text())


if __name__ == "__main__":
    (ROOT / WHEN).write_text(when() + "\n")
    for name in PAGES:
        path = ROOT / name
        path.write_text(filled(path.read_text()))
