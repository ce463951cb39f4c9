"""The README's code runs as written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_readme_code_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    monkeypatch.chdir(ROOT)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    report = capsys.readouterr().out
    assert "(8, 1e-05)-differentially private" in report and "NOT covered" in report


def test_readme_names_files_that_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("source", ["docs/shapes/accuracy.md", "docs/benchmarks/results.md"])
def test_readme_tables_are_those_that_the_commands_wrote(source: str) -> None:
    readme = (ROOT / "README.md").read_text()
    shown = readme.split(f"<!-- {source} -->")[1].split(f"<!-- end {source} -->")[0]
    assert shown.strip() == (ROOT / source).read_text().strip()
