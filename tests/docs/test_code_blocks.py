"""The code in the hand-written pages runs as written, page by page, in order, with one namespace for each page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hf_dp_xattn.privacy.guessing import guess_bound

pytestmark = pytest.mark.as_users
ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WRITTEN_BY_HAND = (
    "index",
    "quickstart-operator",
    "quickstart-assistant",
    "quickstart-publisher",
    "examples",
    "concepts",
    "guarantee",
    "sharp-edges",
    "THREAT_MODEL",
    "audit",
    "library",
    "how-it-works",
)
_BLOCK = re.compile(r"(?:<!-- needs: (.+?) -->\n)?```python\n(.*?)```", flags=re.S)


def blocks(page: str) -> list[tuple[list[str], str]]:
    """(paths that a block needs, its code)."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert len(re.findall(r"```python", text)) == len(_BLOCK.findall(text))
    return [(needs.split(), code) for needs, code in _BLOCK.findall(text)]


@pytest.mark.parametrize("page", [p for p in WRITTEN_BY_HAND if blocks(p)])
def test_code_runs(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    namespace: dict[str, Any] = {}
    absent = []
    for needs, code in blocks(page):
        absent += [name for name in needs if not (ROOT / name).exists()]
        if all((ROOT / name).exists() for name in needs):
            exec(compile(code, f"{page}.md", "exec"), namespace)
    if absent:
        pytest.skip(f"all blocks ran but those that need {', '.join(absent)}, which this checkout lacks")


def test_most_pages_have_code() -> None:
    assert sum(bool(blocks(p)) for p in WRITTEN_BY_HAND) >= 4


@pytest.mark.parametrize("page", WRITTEN_BY_HAND)
def test_files_that_are_named_exist(page: str) -> None:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:hf_dp_xattn|tests|examples|benchmarks|model_cards)/[\w./-]*)`", text)
    named += re.findall(r"<!-- docstring: (\S+) -->", text)
    for name in named:
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (DOCS / link).exists(), link


def test_the_table_of_odds_is_what_the_function_gives() -> None:
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    for epsilon in (1.0, 2.0, 4.0, 8.0):
        bounds = " | ".join(f"{guess_bound(epsilon, 1e-5, p):.3g}" for p in (0.5, 0.01, 1e-6))
        assert f"| {epsilon:g} | {bounds} |" in text
