"""The command line: exit codes, output for people and for programs, and help that does not load torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_dp_xattn.cli import COMMANDS, main

from .calibration.anchor_calibrations import calibration


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(calibration().save_pretrained(tmp_path / "shapes"))


def test_a_table(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--epsilon", "4"]) == 0
    out, err = capsys.readouterr()
    assert "Plan for shapes" in out and "response" in out and " ms" in out and err == ""


def test_json_and_plot(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "out.png"
    arguments = ["plan", folder, "--epsilons", "1", "2", "8", "--want-fvu", "0.5", "--json", "--no-measure"]
    assert main([*arguments, "--plot", str(plot)]) == 0
    out, err = capsys.readouterr()
    values = json.loads(out)  # nothing but JSON on stdout
    assert [p["epsilon"] for p in values["points"]] == [1.0, 2.0, 8.0]
    assert values["points"][0]["seconds"] is None
    assert plot.is_file() and str(plot) in err


def test_not_reached(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", folder, "--want-score", "0.99", "--no-measure"]) == 1
    assert "not reached up to epsilon = 16" in capsys.readouterr().out
    assert main(["plan", folder, "--want-score", "0.8", "--want-fvu", "0.01", "--no-measure"]) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epsilon", "-1"],
        ["--unit", "context"],
        ["--rows", "1000"],
        ["--dtype", "int8"],
        ["--plot", "/nowhere/at/all.png"],
    ],
    ids=str,
)
def test_bad_input_is_one_line_on_stderr(
    folder: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", folder, "--no-measure", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hf-dp-xattn: ") and err.count("\n") == 1 and "Traceback" not in err


def test_a_folder_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "no/such-calibration"]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["plan"], ["plan", "x", "--epsilon", "1", "--epsilons", "2"]]
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2


def test_a_bug_is_not_hidden(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_dp_xattn.calibration.planner as planner

    def bug(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(planner, "plan", bug)
    with pytest.raises(ZeroDivisionError):
        main(["plan", folder])


@pytest.mark.parametrize("name", [None, *(c.NAME for c in COMMANDS)])
def test_help_teaches(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"] if name is None else [name, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and f"hf-dp-xattn {name or 'plan'} ./" in out and "exit codes" in out


def test_python_m() -> None:
    """The module form works, and help is quick because it loads no torch."""
    code = "import sys, runpy; sys.argv = ['x', '--version']\ntry:\n runpy.run_module('hf_dp_xattn', run_name='__main__')\n"
    code += "except SystemExit as stop:\n assert stop.code == 0 and 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hf-dp-xattn ")
