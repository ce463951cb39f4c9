"""`hf-dp-xattn calibrate`: public lines in, a calibration that `protect` takes out."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.checkpoints import Checkpoints
from hf_dp_xattn.cli import main
from hf_dp_xattn.commands.calibrate_command import read_lists
from hf_dp_xattn.commands.models import load_plain, parse_dtype

from .conftest import WORDS

SMALL = ["--epsilons", "8", "--steps", "4"]
PAIRS = [f"{a} {b}, {c}" for a, b, c in itertools.product(WORDS, WORDS[:4], WORDS[:3])]  # 72 lines
LISTS = [json.dumps([f"{a} {b}", f"{c} {a}"]) for a, b, c in itertools.product(WORDS, WORDS[:4], WORDS[:3])]
TEXTS = [" ".join(p) for p in itertools.product(WORDS, WORDS, WORDS[:2])]  # 72 lines of 3 words


def file_of(folder: Path, lines: list[str]) -> str:
    path = folder / "public.txt"
    path.write_text("\n".join(["", *lines, "  "]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    ("model", "lines", "more"),
    [
        ("plain", PAIRS, ["--unit", "group", "--releases", "sum", "response"]),
        ("bart", TEXTS, ["--mechanism", "kernel_sum", "--length", "3"]),
        ("llama", TEXTS, ["--mechanism", "kernel_sum", "--questions", "public.txt"]),
        ("bart", TEXTS, ["--mechanism", "kernel_sum", "--length", "3", "--questions", "questions.txt"]),
        ("bart", LISTS, ["--unit", "group", "--mechanism", "kernel_sum"]),
        ("llama", LISTS, ["--unit", "group", "--releases", "sum", "--prefix-bucket", "8"]),
        (
            "chat",
            LISTS,
            [
                "--unit",
                "group",
                "--chat",
                "--releases",
                "sum",
                "--questions",
                "questions.txt",
                "--replies",
                "1",
            ],
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) if len(x) < 20 else "",
)
def test_each_kind_of_host(
    model: str, lines: list[str], more: list[str], models_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    public = file_of(tmp_path, lines)
    (tmp_path / "questions.txt").write_text("quartz zebra\nwyvern\n")
    named = {"public.txt": public, "questions.txt": str(tmp_path / "questions.txt")}
    more = [named.get(x, x) for x in more]
    folder, out = str(models_folder / model), tmp_path / "made"
    assert main(["calibrate", folder, "--public", public, "--out", str(out), *SMALL, *more, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["contexts"] == 72 and [p["epsilon"] for p in values["plans"]] == [8.0]
    assert all(p["fvu"] > 0 for p in values["plans"])
    calibration = dpx.Calibration.from_pretrained(out)
    unit = calibration.unit if hasattr(calibration, "unit") else calibration.settings["unit"]
    assert unit == values["unit"]
    mechanism = "kernel_sum" if "kernel_sum" in more else "anchors"
    config = dpx.DPXAttnConfig(mechanism=mechanism, epsilon=8.0, unit=unit)
    with dpx.protect(
        load_plain(folder, parse_dtype("float32")), config, calibration=calibration, allow_useless=True
    ) as handle:
        assert handle.calibration is calibration
    assert (out / "README.md").is_file()
    assert main(["report", str(out)]) == 0


def test_what_people_read(models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = ["calibrate", str(models_folder / "plain"), "--public", file_of(tmp_path, PAIRS)]
    out = str(tmp_path / "made")
    assert main([*start, "--out", out, *SMALL, "--releases", "sum"]) == 0
    shown = capsys.readouterr().out
    assert "epsilon 8: sum, fvu" in shown and out in shown
    assert main([*start, "--out", out, *SMALL]) == 2
    assert "choose a new one" in capsys.readouterr().err


BAD: dict[str, tuple[str, list[str], list[str], str]] = {
    "no lines": ("plain", [], [], "holds no text"),
    "few lines": ("plain", PAIRS[:5], ["--steps", "4"], "at least 64"),
    "no length": ("bart", TEXTS, ["--mechanism", "anchors"], "--length"),
    "too long": ("bart", TEXTS, ["--length", "9"], "lower --length"),
    "length of a picture": ("plain", PAIRS, ["--length", "3"], "encoder-decoder"),
    "questions of a picture": ("plain", PAIRS, ["--questions", "public.txt"], "decoder-only"),
    "groups that are no lists": ("llama", TEXTS, ["--mechanism", "anchors", "--unit", "group"], "JSON"),
    "a list of numbers": ("bart", ["[1, 2]"], ["--unit", "group"], "text 1"),
    "an empty list": ("bart", ['["a"]', "[]"], ["--unit", "group"], "text 2"),
    "a length of documents": ("bart", LISTS, ["--unit", "group", "--length", "3"], "--length"),
    "a chat of documents": ("bart", TEXTS, ["--length", "3", "--chat"], "decoder-only"),
    "a chat without a template": ("llama", TEXTS, ["--mechanism", "anchors", "--chat"], "chat template"),
    "a model that reads images": ("mllama", TEXTS, ["--mechanism", "anchors"], "images"),
    "a bad epsilon": ("plain", PAIRS, ["--epsilons", "-1", "--anchors", "64"], "epsilon"),
    "a bad type": ("plain", PAIRS, ["--dtype", "int8"], "--dtype"),
    "a seed that is none": ("plain", PAIRS, ["--seed", "99999999999999999999999"], "--seed"),
    "steps below none": ("plain", PAIRS, ["--steps", "-1"], "--steps"),
    "a length below none": ("bart", TEXTS, ["--length", "-1"], "--length"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    model, lines, more, expected = BAD[name]
    public, out = file_of(tmp_path, lines), tmp_path / "made"
    more = [public if x == "public.txt" else x for x in more]
    code = main(["calibrate", str(models_folder / model), "--public", public, "--out", str(out), *more])
    err = capsys.readouterr().err
    assert code == 2 and expected in err and "Traceback" not in err
    assert not out.exists()


def test_a_file_that_is_not_there(models_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = ["calibrate", str(models_folder / "plain"), "--out", str(tmp_path / "made")]
    assert main([*start, "--public", str(tmp_path / "nothing")]) == 2
    assert "--public takes the name" in capsys.readouterr().err


def test_a_mark_is_no_part_of_a_text_in_json() -> None:
    assert read_lists([json.dumps(["\ufeffone\r\ntwo", "three"])]) == [["one two", "three"]]


def test_a_bare_user_gets_a_library(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Without texts, mechanism or unit; broken off by Ctrl-C, the same command goes on from what it had encoded."""
    from hf_dp_xattn.calibration.library import encoding
    from hf_dp_xattn.hosts import calibrate

    few = dpx.public_prompts("picture")[:60]
    monkeypatch.setattr(calibrate, "public_prompts", lambda kind: few)
    out = tmp_path / "made"
    start = ["calibrate", str(models_folder / "plain"), "--out", str(out), "--epsilons", "8", "--json"]
    keep, calls = Checkpoints.keep, []

    def one(*given: Any) -> None:
        keep(*given)
        calls.append(1)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "keep", one)
        assert main(start) == 130
    assert "goes on" in capsys.readouterr().err and len(list((out / ".unfinished").iterdir())) == 1
    monkeypatch.setattr(
        Checkpoints, "keep", lambda *given: (keep(*given), calls.append(1) if given[0].folder else None)
    )
    assert main(start) == 0
    values = json.loads(capsys.readouterr().out)
    library = dpx.Calibration.from_pretrained(out)
    assert (library.mechanism, library.unit, values["contexts"]) == ("library", "group", 60)
    assert len(calls) == -(-len(library.texts) // encoding.CHUNK) and not (out / ".unfinished").exists()
    assert main([*start[:-3], "--out", str(tmp_path / "less"), "--quick", "--epsilons", "4"]) == 0
    assert "encoding" in capsys.readouterr().err


def test_ctrl_c_before_anything_leaves_no_folder(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from hf_dp_xattn.commands import calibrate_command

    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_command, "load_plain", stop)
    assert main(["calibrate", str(models_folder / "plain"), "--out", str(tmp_path / "a" / "b")]) == 130
    assert "Nothing was spent" in capsys.readouterr().err and not (tmp_path / "a").exists()


def test_a_full_disk_is_one_line(
    models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*given: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "codes.safetensors")

    monkeypatch.setattr("hf_dp_xattn.calibration.library.text_library.TextLibrary.save_pretrained", full)
    start = ["calibrate", str(models_folder / "plain"), "--public", file_of(tmp_path, PAIRS)]
    assert main([*start, "--out", str(tmp_path / "made"), "--epsilons", "8", "--json"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-dp-xattn: Nothing can be written to 'codes.safetensors'")
