"""The site: every public name has a reference, and it builds without a warning."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "assets" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_has_a_reference() -> None:
    pages = "".join(p.read_text() for p in (ROOT / "docs" / "reference").glob("*.md"))
    named = {line.rsplit(".", 1)[1] for line in re.findall(r"^::: (\S+)$", pages, flags=re.M)}
    assert set(dpx.__all__) - {"__version__"} <= named


def test_every_command_has_its_help(hooks: ModuleType) -> None:
    page = (ROOT / "docs" / "reference" / "command-line.md").read_text()
    assert set(re.findall(r"<!-- help: (\w+) -->", page)) == {c.NAME for c in COMMANDS}
    shown = hooks.on_page_markdown(page)
    assert "<!-- help" not in shown and "never an argument" in shown
    assert shown.count("usage: hf-dp-xattn") == 1 + len(COMMANDS)


def test_docstrings_stand_word_for_word(hooks: ModuleType) -> None:
    shown = hooks.on_page_markdown("<!-- docstring: hf_dp_xattn/privacy/response.py -->")
    assert "    ```text\n    Exact k-ary randomised response" in shown and "docstring:" not in shown


def test_absent_pages_leave_the_navigation(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# A")
    nav = [{"A": "a.md"}, {"More": [{"B": "b.md"}, {"A again": "a.md"}]}]
    config = hooks.on_config({"nav": nav, "docs_dir": str(tmp_path)})
    assert config["nav"] == [{"A": "a.md"}, {"More": [{"A again": "a.md"}]}]


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install hf_dp_xattn[docs]")
    pytest.importorskip("mkdocstrings", reason="pip install hf_dp_xattn[docs]")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in ("index.html", "guarantee/index.html", "reference/functions/index.html"):
        assert (tmp_path / "site" / page).stat().st_size > 5000
    assert "public_contexts" in (tmp_path / "site" / "reference" / "functions" / "index.html").read_text()
