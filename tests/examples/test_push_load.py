"""Calibrate, release, push and load: against a stand-in for the Hub, and without one."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ..hub.server import TOKEN, serve

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "calibrate_release_push_load.py"
SMALL = ("--captions", "100", "--steps", "4", "--quiet", "--allow-useless")
SECRET = "a small zebra circle at the bottom, jukebox background"
WORDS = (b"zebra", b"jukebox")


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.slow
def test_it_pushes_and_the_second_machine_draws_the_same(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(SECRET)
    out = tmp_path / "out"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *SMALL, "--out", str(out), "--repo", "me/scene"]
    command += ["--prompt-file", str(tmp_path / "prompt.txt")]
    with serve() as hub:
        done = subprocess.run(
            [*command, "--endpoint", hub.url], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        repo = hub.repos["me/scene"]
        read = [path for method, path in hub.log if method == "GET" and "/resolve/" in path]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["same_picture"] and summary["releases"] == 1  # to load and to draw is not charged
    assert summary["pushed"] == repo.branches["main"]  # the last commit
    names = set(repo.files())
    assert {"calibration/README.md", "release/README.md"} <= names
    assert {n.split("/")[0] for n in names} == {"calibration", "release"}  # no ledger, no report, no picture
    assert any(f"/resolve/{summary['pushed']}/release/" in path for path in read)  # by revision
    for where, content in {
        **repo.files(),
        "bodies": b"".join(hub.bodies),
        "stdout": done.stdout.encode(),
        "stderr": done.stderr.encode(),
        **files(out),
    }.items():
        assert not any(word in content.lower() for word in WORDS), where


@pytest.mark.slow
def test_without_a_repository_nothing_is_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *SMALL, "--out", str(tmp_path)])
    for method in ("create_repo", "upload_folder", "create_commit"):
        monkeypatch.setattr(f"huggingface_hub.HfApi.{method}", lambda *a, **k: pytest.fail("it pushed"))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr().out
    assert "nothing was pushed" in shown and "Plan for" in shown and "NOT covered" in shown
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"pushed": None, "repo": None, "same_picture": True, "releases": 1}
    assert {"calibration", "release"} <= {f.name for f in tmp_path.iterdir()}


def test_an_endpoint_without_a_repository_is_refused() -> None:
    command = [sys.executable, str(SCRIPT), "--endpoint", "http://127.0.0.1:9"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "give both" in done.stderr
