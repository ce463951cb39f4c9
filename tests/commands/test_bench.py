"""`hf-dp-xattn bench`: what is measured and how it is told; never how long it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dp_xattn.cli import main
from hf_dp_xattn.hosts.diffusers.processor import DPAttnProcessor

from .test_audit import anchored
from .test_release import KERNEL


def bench(models: Path, name: str, *more: str) -> int:
    return main(["bench", str(models / name), "--repeats", "2", *more])


def check_spread(spread: dict[str, float]) -> None:
    assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_a_denoising_step(models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(models_folder, "plain", *anchored(models_folder), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert "latents 8 x 8" in values["what"] and values["repeats"] == 2 and values["release_bytes"] > 100
    assert set(values["ratios"]) == {"step"}
    assert set(values["seconds"]) == {"protect", "release", "step, protected", "step, unprotected"}
    for spread in [*values["seconds"].values(), *values["ratios"].values()]:
        check_spread(spread)


@pytest.mark.parametrize(("model", "unit"), [("bart", "row"), ("llama", "group")])
def test_answers(model: str, unit: str, models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [*KERNEL, "--unit", unit, "--new-tokens", "3"]
    assert bench(models_folder, model, *more, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values["ratios"]) == {"first token", "token after the first"}
    check_spread(values["seconds"]["first token, protected"])
    assert bench(models_folder, model, *more) == 0
    shown = capsys.readouterr().out
    assert "protected / unprotected" in shown and "a release in a file" in shown and "2 pairs" in shown


def test_the_protected_side_is_protected_and_the_other_is_not(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps (one to warm up) of four layers for each pair, and no more, go through the processor."""
    calls: list[int] = []
    attend = DPAttnProcessor._attend

    def counted(self: Any, *given: Any) -> Any:
        calls.append(1)
        return attend(self, *given)

    monkeypatch.setattr(DPAttnProcessor, "_attend", counted)
    assert bench(models_folder, "plain", *KERNEL, "--json") == 0
    assert len(calls) == 2 * 2 * 4


def test_a_broken_output_gives_no_times(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attend = DPAttnProcessor._attend
    monkeypatch.setattr(DPAttnProcessor, "_attend", lambda self, *a: attend(self, *a) * float("nan"))
    assert bench(models_folder, "plain", *KERNEL) == 2
    shown = capsys.readouterr()
    assert "NaN" in shown.err and "ms" not in shown.out


BAD: dict[str, tuple[str, list[str], str]] = {
    "tokens of a picture": ("plain", [*KERNEL, "--new-tokens", "4"], "language models"),
    "latents of a text": ("bart", [*KERNEL, "--latents", "8"], "pipelines"),
    "odd latents": ("plain", [*KERNEL, "--latents", "7"], "multiple"),
    "one token": ("llama", [*KERNEL, "--new-tokens", "1"], "--new-tokens"),
    "no repeats": ("plain", [*KERNEL, "--repeats", "0"], "--repeats"),
    "no price": ("plain", [], "--epsilon"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, more, expected = BAD[name]
    assert bench(models_folder, model, *more) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err
