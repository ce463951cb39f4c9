"""Mechanism, unit and neighbouring relation are the calibration's where the options leave them open, for every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.hosts.storage import ReleaseFile

from ..hosts_tiny import tiny_sd
from .test_calibrate import PAIRS
from .test_release import prompt  # noqa: F401 (a fixture)

PRICE = ["--epsilon", "8"]
FAST_AUDIT = ["--draws", "100", "--trials", "10"]


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the tiny pipeline, none of them for the defaults of a config."""
    root = tmp_path_factory.mktemp("calibrations")
    fast: dict[str, Any] = {"epsilons": (8.0,), "progress": False, "query_prompts": 2, "query_steps": 2}
    asked = {
        "anchors": (dpx.DPXAttnConfig(mechanism="anchors", unit="context"), {"steps": 4, "anchors": 64}),
        "kernel_sum": (dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context", degree=1), {"rank": 4}),
        "add": (
            dpx.DPXAttnConfig(mechanism="anchors", unit="row", neighboring="add_or_remove_one"),
            {"steps": 4, "anchors": 64, "releases": ("histogram",)},
        ),
        "row": (dpx.DPXAttnConfig(mechanism="anchors", unit="row"), {"steps": 4, "anchors": 64}),
    }
    for name, (config, more) in asked.items():
        dpx.calibrate(tiny_sd(), PAIRS, config, **fast, **more).save_pretrained(root / name)
    return {name: root / name for name in asked}


EXPECTED = {
    "anchors": {"mechanism": "anchors", "unit": "context", "neighboring": "replace_one"},
    "kernel_sum": {"mechanism": "kernel_sum", "unit": "context", "neighboring": "replace_one", "degree": 1},
    "add": {"mechanism": "anchors", "unit": "row", "neighboring": "add_or_remove_one"},
}


def check_config(config: dict[str, Any], name: str) -> None:
    assert {k: config[k] for k in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.slow
def test_release_and_generate(
    name: str,
    calibrations: dict[str, Path],
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    start = [
        str(models_folder / "plain"),
        *PRICE,
        "--calibration",
        str(calibrations[name]),
        "--allow-useless",
    ]
    start += ["--prompt-file", prompt, "--ledger"]  # so short a fit is of no use
    out = tmp_path / "release"
    assert main(["release", *start, str(tmp_path / "l"), "--out", str(out), "--json"]) == 0
    check_config(ReleaseFile.load(out).config.to_dict(), name)
    kept = tmp_path / "kept"
    more = ["--keep", str(kept), "--out", str(tmp_path / "a.png"), "--steps", "1", "--json"]
    assert main(["generate", *start, str(tmp_path / "m"), *more]) == 0
    check_config(ReleaseFile.load(kept).config.to_dict(), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anchors", "kernel_sum"])
def test_audit_bench_and_demo(
    name: str,
    calibrations: dict[str, Path],
    models_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, given = str(models_folder / "plain"), ["--calibration", str(calibrations[name]), "--json"]
    assert main(["bench", model, *PRICE, *given, "--repeats", "1"]) == 0
    check_config(json.loads(capsys.readouterr().out)["config"], name)
    assert main(["audit", model, *PRICE, *given, *FAST_AUDIT]) == 0
    check_config(json.loads(capsys.readouterr().out)["config"], name)
    start = ["demo", model, *given, "--epsilons", "8", "--steps", "1", "--out", str(tmp_path)]
    assert main(start) == 0
    check_config(json.loads(capsys.readouterr().out)["report"]["config"], name)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("anchors", ["--mechanism", "kernel_sum"], "This calibration is for mechanism='anchors'"),
        ("anchors", ["--unit", "row"], "The calibration was made with unit='context'"),
        (
            "anchors",
            ["--neighboring", "add_or_remove_one"],
            "unit='context' with neighboring='add_or_remove_one'",
        ),
        ("row", ["--neighboring", "add_or_remove_one"], "was made with neighboring='replace_one'"),
        ("kernel_sum", ["--mechanism", "anchors"], "This calibration is for mechanism='kernel_sum'"),
        ("kernel_sum", ["--unit", "row"], "The calibration was made with unit='context'"),
        ("add", ["--neighboring", "replace_one"], "was made with neighboring='add_or_remove_one'"),
    ],
)
def test_an_option_that_contradicts_is_an_error(
    name: str,
    more: list[str],
    expected: str,
    calibrations: dict[str, Path],
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ["release", str(models_folder / "plain"), *PRICE, "--calibration", str(calibrations[name]), *more]
    start += ["--prompt-file", prompt, "--ledger", str(tmp_path / "l"), "--out", str(tmp_path / "r")]
    assert main(start) == 2
    assert expected in capsys.readouterr().err and dpx.Ledger(tmp_path / "l").entries() == ()


def test_a_config_is_taken_as_it_is(
    calibrations: dict[str, Path],
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(models_folder / "config")
    start = ["release", str(models_folder / "plain"), "--config", config]
    start += ["--calibration", str(calibrations["anchors"])]
    start += ["--prompt-file", prompt, "--ledger", str(tmp_path / "l"), "--out", str(tmp_path / "r")]
    assert main(start) == 2
    assert "This calibration is for mechanism='anchors'" in capsys.readouterr().err


def test_the_shipped_demo_with_another_of_its_calibrations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model and a unit: the unit is the calibration's, not the demo's own."""
    row = Path(__file__).resolve().parents[2] / "examples" / "shapes" / "calibrations" / "row"
    start = ["demo", "--calibration", str(row), "--epsilons", "8", "--steps", "1", "--out", str(tmp_path)]
    assert main([*start, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unit"] == "row"


@pytest.mark.parametrize("command", ["release", "generate", "audit", "bench", "demo"])
def test_the_help_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: what the calibration is for)" in shown
    assert "default: the calibration's; without one, group" in shown


def test_what_the_publishers_page_says_of_a_config_without_a_mechanism() -> None:
    assert dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row").mechanism == "kernel_sum"
    page = (Path(__file__).resolve().parents[2] / "docs" / "quickstart-publisher.md").read_text()
    assert 'DPXAttnConfig(mechanism="anchors"' in page and "Leave `mechanism` out" not in page
