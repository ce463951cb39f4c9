"""The ledger of the command line: the one that is named, else one file for all that the user releases; its path is told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.privacy.default_ledger import VARIABLE, user_ledger_path

from .test_release import KERNEL, prompt  # noqa: F401 (a fixture)


@pytest.fixture
def start(models_folder: Path, prompt: str) -> list[str]:  # noqa: F811
    return ["release", str(models_folder / "plain"), *KERNEL, "--prompt-file", prompt, "--json"]


def test_two_commands_share_the_file_in_the_cache_folder(
    start: list[str], own_process_ledger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_process_ledger / "hf_dp_xattn" / "ledger.json"
    assert main([*start, "--out", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["ledger"] == str(path) and f"ledger: {path}" in shown.err
    charged = dpx.Ledger(path).entries()
    assert {c.number_of_releases for c in charged} == {1}
    assert main([*start, "--out", str(tmp_path / "b")]) == 1
    assert "would exceed" in capsys.readouterr().err and dpx.Ledger(path).entries() == charged
    draw = ["generate", *start[1:-1], "--out", str(tmp_path / "a.png")]
    assert main(draw) == 1  # another command, the same account
    assert f"ledger: {path}" in capsys.readouterr().err and dpx.Ledger(path).entries() == charged
    assert main([*start, "--ledger", str(tmp_path / "own"), "--out", str(tmp_path / "c")]) == 0
    assert dpx.Ledger(path).entries() == charged


def test_the_variable_comes_before_the_cache_folder(
    start: list[str], own_process_ledger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "named.json"))
    assert main([*start, "--out", str(tmp_path / "a")]) == 0
    assert dpx.Ledger(tmp_path / "named.json").entries() and not list(own_process_ledger.iterdir())


def test_where_the_cache_folder_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_ledger_path() == tmp_path / "x" / "hf_dp_xattn" / "ledger.json"
    assert (tmp_path / "x" / "hf_dp_xattn").stat().st_mode & 0o777 == 0o700
    for nothing in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        monkeypatch.setattr(sys, "platform", "linux")
        assert user_ledger_path() == tmp_path / ".cache" / "hf_dp_xattn" / "ledger.json"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert user_ledger_path() == tmp_path / "Library" / "Caches" / "hf_dp_xattn" / "ledger.json"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(dpx.LedgerError, match="--ledger FILE"):
        user_ledger_path()
