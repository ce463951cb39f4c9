"""The private style library: one charge for a look that grows, and customers' pictures that carry it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOOK = "blue background\na small yellow star at the bottom\n"


@pytest.mark.slow
def test_the_look_is_charged_once_and_seen_in_the_pictures(tmp_path: Path) -> None:
    look = tmp_path / "look.txt"
    look.write_text(LOOK)
    command = [sys.executable, "examples/private_style_library.py", "--out", str(tmp_path), "--epsilon", "64"]
    command += ["--look", str(look), "--public", "a large red circle on the left"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "report.txt").read_text()
    assert "charges on this context: 1, spent in total: epsilon 64.0000" in report
    assert "grows by at most 8 appends" in report and "one group of rows" in report
    seen = {
        line.split("  ")[2].strip(): line.rsplit("  ", 1)[1].strip()
        for line in done.stdout.splitlines()
        if " background; " in line
    }
    assert len(seen) == 4
    # At epsilon = 64 each of a phrase's 5 answers is the true one with probability .9993 (see the plan): the look is missed in fewer than
    # 1 run in 100, so what is asserted is only what holds for any answers: the words alone know no look, and exact attention has all of it.
    assert "blue background" not in seen["words alone (public)"]
    assert seen["exact look (not private)"].startswith("blue background")
    assert "star bottom" in seen["exact look (not private)"]
    assert (tmp_path / "style_library.png").stat().st_size > 0
