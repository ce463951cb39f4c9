"""The demo runs (small) and leaves what it says it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_demo(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "examples/demo.py",
        "-n",
        "2",
        "--public",
        "16",
        "--json",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    summary = json.loads(done.stdout)
    epsilons = [r["epsilon"] for r in summary["rows"]]
    assert epsilons == [
        "public prompt only",
        "1",
        "4",
        "16",
        "64",
        "none (not private)",
        "unprotected pipeline",
    ]
    by_name = {r["epsilon"]: r["accuracy"] for r in summary["rows"]}
    assert by_name["none (not private)"] == by_name["unprotected pipeline"] > 0.8
    for name in ("strip.png", "accuracy.png", "accuracy.md", "report.txt", "report.json"):
        assert (tmp_path / name).stat().st_size > 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["releases"][0]["guarantee"]["is_private"] and report["not_covered"]
