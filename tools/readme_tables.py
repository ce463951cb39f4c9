"""Puts the tables that the benchmarks wrote between their markers in README.md: `python tools/readme_tables.py`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- (docs/\S+) -->\n.*?<!-- end \1 -->", re.DOTALL)


def filled(readme: str) -> str:
    """The text with every marked block replaced by the file it names."""
    return BLOCK.sub(
        lambda m: f"<!-- {m[1]} -->\n{(ROOT / m[1]).read_text().strip()}\n<!-- end {m[1]} -->", readme
    )


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
