"""The demo runs (small) and leaves what it says it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_demo(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "-n", "2", "--json", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    for unit in ("row", "group", "context"):
        epsilons = [x["epsilon"] for x in summary["lines"] if x["series"] == unit]
        assert epsilons == ["public prompt only", "1", "4", "8", "16", "unprotected pipeline"]
        assert next(x for x in summary["lines"] if x["epsilon"] == "unprotected pipeline")["accuracy"] > 0.8
    for name in ("strip.png", "accuracy.png", "accuracy.md", "report.txt", "report.json", "plan.txt"):
        assert (tmp_path / name).stat().st_size > 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["releases"][0]["guarantee"]["is_private"] and report["not_covered"]
