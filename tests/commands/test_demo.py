"""`hf-dp-xattn demo`: a labelled strip, or replies, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_dp_xattn.cli import main
from hf_dp_xattn.commands import demo_command as module

from .test_release import KERNEL

FAST = ["--steps", "1", "--epsilons", "1", "8"]
MECHANISM = KERNEL[:2]


def test_a_strip(models_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["demo", str(models_folder / "plain"), *FAST, "--text", "a red dog", "--out", str(tmp_path)]
    more = ["--calibration", str(models_folder / "calibration")]
    assert main([*start, *more, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    labels = [c["label"] for c in values["columns"]]
    assert labels == ["no text", "not protected", "epsilon 1", "epsilon 8"]
    assert values["report"]["config"]["mechanism"] == "anchors" and values["file"] == str(
        tmp_path / "demo.png"
    )
    strip = np.asarray(Image.open(tmp_path / "demo.png"))
    pictures = np.array_split(strip, 4, axis=1)
    assert all(p.std() > 0 for p in pictures)
    assert not np.array_equal(pictures[1], pictures[2])
    assert main([*start, *more]) == 0
    shown = capsys.readouterr()
    assert "demo.png" in shown.err and "Privacy report" in shown.out and "2 times" in shown.out


@pytest.mark.parametrize(("model", "unit"), [("bart", "row"), ("llama", "context"), ("llama", "group")])
def test_replies(model: str, unit: str, models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = [
        "demo",
        str(models_folder / model),
        *FAST[2:],
        *MECHANISM,
        "--unit",
        unit,
        "--out",
        str(tmp_path),
    ]
    start += ["--text", "zebra quartz", "obelisk wyvern", "--new-tokens", "3"]
    start += ["--question", "jukebox marzipan"] if model == "llama" else []
    assert main([*start, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    replies = {c["label"]: c["reply"] for c in values["columns"]}
    assert {"not protected", "epsilon 1", "epsilon 8"} <= set(replies)
    assert ("no text" in replies) == (model == "llama")
    assert len(values["report"]["releases"]) == 1 and values["unit"] == unit
    assert not list(tmp_path.iterdir())
    assert main(start) == 0
    assert "not protected  " in capsys.readouterr().out


def test_a_model_saved_with_its_protection(models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = ["demo", str(models_folder / "protected"), *FAST, "--out", str(tmp_path), "--json"]
    assert main(start) == 0
    assert len(json.loads(capsys.readouterr().out)["columns"]) == 4
    assert main([*start, "--unit", "row"]) == 2
    assert "protected already" in capsys.readouterr().err


def test_without_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *FAST, "--json"]) == 0  # the checkout that the package was imported from
    values = json.loads(capsys.readouterr().out)
    assert values["unit"] == "context" and Path("demo.png").is_file()
    monkeypatch.setattr(module, "_SHIPPED", Path("nowhere"))
    assert main(["demo", *FAST]) == 2
    assert "Name a model" in capsys.readouterr().err


BAD: dict[str, tuple[str, list[str], str]] = {
    "no calibration": ("plain", ["--mechanism", "anchors"], "calibration"),
    "a bad epsilon": ("plain", [*MECHANISM, "--epsilons", "-1"], "epsilon"),
    "no folder": ("plain", [*MECHANISM, "--out", "/nowhere/at/all"], "--out"),
    "no steps": ("plain", [*MECHANISM, "--steps", "0"], "--steps"),
    "too many steps": ("plain", [*MECHANISM, "--steps", "5000"], "--steps 5000 does not suit"),
    "no guidance": ("plain", [*MECHANISM, "--guidance", "nan"], "--guidance"),
    "a size that is none": ("plain", [*MECHANISM, "--pixels", "33"], "multiple of 8"),
    "a seed that is none": ("plain", [*MECHANISM, "--seed", "99999999999999999999999"], "--seed"),
    "no tokens": ("bart", [*MECHANISM, "--new-tokens", "0"], "--new-tokens"),
    "no words": ("plain", [*MECHANISM, "--text", " "], "--text"),
    "a question to a pipeline": ("plain", [*MECHANISM, "--question", "why?"], "--question"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    model, more, expected = BAD[name]
    assert main(["demo", str(models_folder / model), "--out", str(tmp_path), *more]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_the_help_says_that_the_text_is_public(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    out = capsys.readouterr().out
    assert "must be PUBLIC" in out and "exit codes" in out


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_without_a_calibration_public_texts_answer(
    model: str,
    models_folder: Path,
    tmp_path: Path,
    own_process_ledger: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    """A library of the shipped prompts, made once and kept in the cache folder."""
    import hf_dp_xattn as dpx
    from hf_dp_xattn.hosts import calibrate

    few = {kind: dpx.public_prompts(kind)[:30] for kind in ("picture", "system")}
    monkeypatch.setattr(calibrate, "public_prompts", lambda kind="system": few[kind])
    start = ["demo", str(models_folder / model), "--epsilons", "1", "8", "--out", str(tmp_path), "--json"]
    start += ["--steps", "1"] if model == "plain" else ["--new-tokens", "3"]
    assert main(start) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["report"]["config"]["mechanism"] == "library"
    released = [c["released"] for c in values["columns"] if c["epsilon"]]
    assert len(released) == 2 and not any("482913" in text for text in released)
    [kept] = (own_process_ledger / "hf_dp_xattn" / "libraries").iterdir()
    monkeypatch.setattr(calibrate, "public_prompts", lambda kind="system": [])  # it is not made again
    assert main(start) == 0 and kept.is_dir()
