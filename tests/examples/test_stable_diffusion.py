"""Stable Diffusion with a private prompt: one charge for many pictures, and none beyond the budget of a ledger on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import hf_dp_xattn as dpx

ROOT = Path(__file__).resolve().parents[2]


def run(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "examples/stable_diffusion.py", "--out", str(tmp_path), "--pictures", "2"]
    command += ["--steps", "2", "--prompt-file", str(tmp_path / "prompt.txt")]
    command += ["--ledger", str(tmp_path / "ledger.json")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_two_pictures_are_charged_once_and_a_second_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("a small zebra circle at the bottom, jukebox background")
    first = run(tmp_path)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "Plan for" in first.stdout and "(16, 1e-05)-differentially private" in first.stdout
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "1.png").read_bytes()
    charges = dpx.Ledger(tmp_path / "ledger.json").entries()  # the prompt's token ids, and its text
    assert {c.unit for c in charges} == {"context"} and {c.number_of_releases for c in charges} == {1}
    assert len({c.digest for c in charges}) == len(charges) > 1  # one text, under each of its names
    second = run(tmp_path)  # another process: it reads what was spent, and its release is not the first one's
    assert second.returncode == 1 and "would exceed the context's budget" in second.stderr
    assert dpx.Ledger(tmp_path / "ledger.json").entries() == charges
    kept = (tmp_path / "ledger.json").read_text()
    for text in (first.stdout, first.stderr, second.stdout, second.stderr, kept):
        assert "zebra" not in text and "jukebox" not in text
