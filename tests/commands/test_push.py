"""`hf-dp-xattn push`, in a process of its own with HF_ENDPOINT, as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_dp_xattn.cli import main

from ..hub.artefacts import KINDS, content, files, load, make
from ..hub.server import TOKEN, FakeHub, serve


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    make("release").save_pretrained(tmp_path / "release")
    with serve() as fake:
        environment = {**os.environ, "HF_ENDPOINT": fake.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "hf_dp_xattn"]
        done = subprocess.run(
            [*command, "push", str(tmp_path / "release"), "me/release", "--license", "mit", "--json"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        values = json.loads(done.stdout)
        assert values["kind"] == "release" and values["commit"].startswith(fake.url)
        assert set(fake.repos["me/release"].files()) == files("release")
        code = "import hf_dp_xattn as dpx, sys; from hf_dp_xattn.cli import main; sys.exit(main(['report', 'me/release']))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0 and "differentially private" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_only_its_own_files_go_up(kind: str, tmp_path: Path, hub: FakeHub, capsys: Any) -> None:
    thing = make(kind)
    thing.save_pretrained(tmp_path)
    for name in ("prompt.txt", "ledger.json", "ledger.json.key"):
        (tmp_path / name).write_text("private")
    assert main(["push", str(tmp_path), "me/thing"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(hub.url) and "uploading" in err
    assert set(hub.repos["me/thing"].files()) == files(kind)
    assert content(kind, load(kind, "me/thing")) == content(kind, thing)


def test_what_cannot_be_pushed(tmp_path: Path, models_folder: Path, hub: FakeHub, capsys: Any) -> None:
    make("release").save_pretrained(tmp_path)
    (tmp_path / "dp_xattn_release.safetensors").write_bytes(b"")
    assert main(["push", str(tmp_path), "me/thing"]) == 2
    assert main(["push", str(models_folder / "protected"), "me/thing"]) == 2
    assert "push_to_hub" in capsys.readouterr().err
    assert hub.repos == {}


def test_a_failure_is_one_line(tmp_path: Path, hub: FakeHub, capsys: Any) -> None:
    make("config").save_pretrained(tmp_path)
    hub.fail_commit = 500
    assert main(["push", str(tmp_path), "me/thing", "--json"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hf-dp-xattn: ") and "HTTP 500" in err and "Traceback" not in err
