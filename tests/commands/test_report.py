"""`hf-dp-xattn report`: what saved files promise, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main

from ..hub.artefacts import CONFIG, KINDS, make
from ..hub.server import FakeHub


def report(capsys: Any, *arguments: str) -> tuple[int, Any]:
    code = main(["report", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_release(tmp_path: Path, capsys: Any) -> None:
    release = make("release")
    release.save_pretrained(tmp_path)
    code, values = report(capsys, str(tmp_path))
    assert code == 0 and values["kind"] == "release" and values["is_private"]
    entry = values["report"]["releases"][0]
    assert entry["guarantee_text"] == release.guarantees[0].sentence() and entry["charges"] is None
    assert values["report"]["not_covered"] == list(release.terms.not_covered)
    main(["report", str(tmp_path)])
    assert release.guarantees[0].sentence() in capsys.readouterr().out


def test_a_protected_model(models_folder: Path, capsys: Any) -> None:
    code, values = report(capsys, str(models_folder / "protected"))
    assert code == 0 and values["kind"] == "protection" and values["config"]["epsilon"] == 8.0
    assert values["budget"]["epsilon"] == 8.0 and any("LoRA" in x for x in values["not_covered"])
    main(["report", str(models_folder / "protected")])
    assert "(8, 1e-05)-differentially private" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["config", "calibration", "anchors calibration"])
def test_other_kinds(kind: str, tmp_path: Path, capsys: Any) -> None:
    make(kind).save_pretrained(tmp_path)
    code, values = report(capsys, str(tmp_path))
    assert code == 0 and values["kind"] == kind.split()[-1]


def test_not_private_has_its_own_exit_code(tmp_path: Path, capsys: Any) -> None:
    CONFIG.replace(mechanism="none").save_pretrained(tmp_path)
    code, values = report(capsys, str(tmp_path))
    assert code == 1 and not values["is_private"]
    assert main(["report", str(tmp_path)]) == 1 and "NOT PRIVATE" in capsys.readouterr().out


def test_damage_is_told(tmp_path: Path, models_folder: Path, capsys: Any) -> None:
    make("release").save_pretrained(tmp_path)
    path = tmp_path / "dp_xattn_release.json"
    path.write_text(path.read_text().replace('"epsilon": 2.0', '"epsilon": 0.1'))
    assert main(["report", str(tmp_path)]) == 2
    assert "checksum" in capsys.readouterr().err
    assert main(["report", str(models_folder / "plain")]) == 2
    assert "holds no release" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_from_the_hub(kind: str, hub: FakeHub, capsys: Any) -> None:
    make(kind).push_to_hub("me/thing", subfolder="a")
    assert report(capsys, "me/thing", "--subfolder", "a")[0] == 0
    assert main(["report", "me/thing", "--revision", "nowhere"]) == 2
    assert "could not be read" in capsys.readouterr().err


def test_a_protected_model_from_the_hub(models_folder: Path, hub: FakeHub, capsys: Any) -> None:
    pipe = dpx.from_pretrained(models_folder / "protected")
    pipe.push_to_hub("me/pipe")
    assert report(capsys, "me/pipe")[1]["kind"] == "protection"
