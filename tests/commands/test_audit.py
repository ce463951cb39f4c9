"""`hf-dp-xattn audit`: passes on sound hosts, exit code 1 on a broken one, nothing of the candidates in what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_dp_xattn.audit import AuditReport
from hf_dp_xattn.audit.audit_report import LIMITS
from hf_dp_xattn.cli import main
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum

from ..hub.hosts import LONG_SECRET, SECRET
from ..private_content import PrivateContent, check_clean
from .test_release import KERNEL

FAST = ["--draws", "400", "--trials", "50"]


def audit(models: Path, name: str, *more: str) -> int:
    return main(["audit", str(models / name), *FAST, *more])


def anchored(models: Path) -> list[str]:
    return ["--mechanism", "anchors", "--epsilon", "8", "--calibration", str(models / "calibration")]


@pytest.mark.parametrize(
    ("model", "more"),
    [("plain", ["anchors"]), ("protected", []), ("bart", KERNEL), ("llama", [*KERNEL, "--unit", "context"])],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "as saved",
)
def test_a_sound_host_passes(model: str, more: list[str], models_folder: Path, capsys: Any) -> None:
    assert audit(models_folder, model, *(anchored(models_folder) if more == ["anchors"] else more)) == 0
    shown = capsys.readouterr()
    assert ", 0 failed" in shown.out and "no budget of yours was spent" in shown.out
    assert all(line in shown.out for line in LIMITS)
    assert "audit" in shown.err  # progress


def test_json_holds_all_and_nothing_of_the_candidates(
    models_folder: Path, tmp_path: Path, capfd: Any
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text(f"{SECRET}\n\n{LONG_SECRET}\nobelisk wyvern\n")
    assert audit(models_folder, "llama", *KERNEL, "--unit", "group", "--candidates", str(file), "--json") == 0
    shown = capfd.readouterr()
    values = json.loads(shown.out)  # nothing but JSON on stdout
    assert values["passed"] and {c["verdict"] for c in values["checks"]} == {"pass"}
    assert values["extraction"]["candidates"] == 3 and values["extraction"]["units"] == 1
    assert [b["draws"] for b in values["bounds"]] == [400, 400]
    assert set(values) == {*AuditReport.__dataclass_fields__, "passed"}
    blobs = {"out": shown.out.encode(), "err": shown.err.encode()}
    check_clean(blobs, PrivateContent(texts=(SECRET, LONG_SECRET)))


def test_a_broken_release_fails(
    models_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(PreparedKernelSum, "noise", lambda self, exact, entropy: exact)
    assert audit(models_folder, "bart", *KERNEL, "--json") == 1
    values = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in values["checks"] if c["verdict"] == "fail"] == ["replay"]
    assert not values["passed"]


BAD: dict[str, tuple[str, list[str], str]] = {
    "no price": ("plain", [], "--epsilon"),
    "too few draws": ("plain", [*KERNEL, "--draws", "5"], "draws"),
    "no confidence": ("plain", [*KERNEL, "--confidence", "1.5"], "confidence"),
    "no such file": ("plain", [*KERNEL, "--candidates", "nowhere.txt"], "--candidates"),
    "no such model": ("nothing", KERNEL, "is no folder"),
    "settings of a protected model": ("protected", KERNEL, "protected already"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, more, expected = BAD[name]
    assert audit(models_folder, model, *more) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err


def test_candidates_must_differ(models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "texts.txt"
    for text in (SECRET, f"{SECRET}\n{SECRET}\n"):
        file.write_text(text)
        assert audit(models_folder, "llama", *KERNEL, "--candidates", str(file)) == 2
        err = capsys.readouterr().err
        assert "two texts" in err and "zebra" not in err


def test_the_help_says_what_it_cannot_show(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    out = capsys.readouterr().out
    assert "no proof" in out and "lower bound" in out and "exit codes" in out
