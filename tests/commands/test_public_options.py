"""`hf-dp-xattn generate`: public options are refused before the charge, and what fails after it is told in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import transformers

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.commands import generate_command as module
from hf_dp_xattn.hosts.diffusers.picture_driver import PipelineDriver
from hf_dp_xattn.hosts.protect import Release

from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from ..hosts_tiny import tiny_img2img
from .conftest import word_tokenizer
from .test_generate import PICTURE, generate
from .test_release import KERNEL, prompt  # noqa: F401 (a fixture)

HUGE = "99999999999999999999999"
SPEND = [*KERNEL, "--ledger", "l"]
DRAW = [*SPEND, "--out", "a.png"]
ASK = [*SPEND, "--public", "quartz"]

BAD: dict[str, tuple[str, list[str], str]] = {
    "no steps": ("plain", [*DRAW, "--steps", "0"], "--steps must be an integer from 1"),
    "steps below none": ("plain", [*DRAW, "--steps", "-4"], "--steps must be an integer from 1"),
    "more steps than there are": ("plain", [*DRAW, "--steps", "5000"], "--steps 5000 does not suit"),
    "an odd height": ("plain", [*DRAW, "--height", "33"], "--height must be a multiple of 8"),
    "an odd width": ("plain", [*DRAW, "--width", "12"], "--width must be a multiple of 8"),
    "a height below none": ("plain", [*DRAW, "--height", "-32"], "--height must be an integer from 1"),
    "no guidance": ("plain", [*DRAW, "--guidance", "nan"], "--guidance must be a finite number"),
    "endless guidance": ("plain", [*DRAW, "--guidance", "inf"], "--guidance must be a finite number"),
    "guidance away": ("plain", [*DRAW, "--guidance", "-1"], "--guidance must be a finite number"),
    "a seed that is none": ("plain", [*DRAW, "--seed", HUGE], "--seed must be an integer from 0 to 2^63 - 1"),
    "a seed below none": ("llama", [*ASK, "--seed", "-1"], "--seed must be an integer from 0"),
    "a seed of a text": ("bart", [*SPEND, "--seed", HUGE], "--seed must be an integer from 0"),
    "no tokens": ("bart", [*SPEND, "--new-tokens", "0"], "--new-tokens must be an integer from 1"),
    "tokens below none": ("llama", [*ASK, "--new-tokens", "-1"], "--new-tokens must be an integer from 1"),
    "more tokens than positions": ("bart", [*SPEND, "--new-tokens", "70"], "The decoder has 64 positions"),
    "no question": ("llama", [*SPEND, "--public", " "], "--public holds no words"),
    "no public document": ("bart", [*SPEND, "--public", ""], "--public holds no words"),
    "a type that no model runs in": ("plain", [*DRAW, "--dtype", "float8_e5m2"], "--dtype"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def charges() -> int:
    """How many releases were charged, of whatever names: a prompt has two, its token ids and its text."""
    return len({c.events for c in dpx.Ledger("l").entries()}) if Path("l").exists() else 0


@pytest.mark.parametrize("name", BAD)
def test_refused_before_the_charge(
    name: str,
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, more, expected = BAD[name]
    assert generate(models_folder, model, *more, "--prompt-file", prompt, "--json") == 2
    shown = capsys.readouterr()
    [line] = [x for x in shown.err.splitlines() if x.startswith("hf-dp-xattn: ")]
    assert expected in line and not shown.out and charges() == 0
    assert "--dtype" in expected or line.endswith("Nothing was spent.")


def test_a_question_that_leaves_no_room(
    here: Path,
    prompt: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """GPT-2 has as many positions as its table; the prefix takes 64 of them by default, so that a smaller bucket is asked for."""
    decoder_tiny("gpt2").save_pretrained("gpt2")
    word_tokenizer().save_pretrained("gpt2")
    start = [*ASK, "--prefix-bucket", "8", "--prompt-file", prompt, "--json"]
    limit = decoder_tiny("gpt2").config.n_positions
    assert generate(here, "gpt2", *start, "--new-tokens", str(limit - 8 + 1)) == 2
    err = capsys.readouterr().err
    assert "max_new_tokens" in err and "Nothing was spent." in err and charges() == 0
    assert generate(here, "gpt2", *start, "--new-tokens", str(limit - 8)) == 0
    assert charges() == 1


def test_a_pipeline_that_starts_from_an_image(
    here: Path,
    prompt: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny_img2img().save_pretrained("img2img")
    assert generate(here, "img2img", *DRAW, "--prompt-file", prompt) == 2
    assert "starts from an image" in capsys.readouterr().err and charges() == 0


def test_a_saved_release_needs_good_options_too(
    models_folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in (["--steps", "0"], ["--seed", HUGE]):
        assert generate(models_folder, "plain", "--release", "nowhere", "--out", "a.png", *more) == 2
        assert more[0] in capsys.readouterr().err


def fail(error: BaseException) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> Any:
        raise error

    return run


FAILURES: dict[str, tuple[Any, str, BaseException, str]] = {
    "foreign": (
        PipelineDriver,
        "draw",
        RuntimeError("no\nmemory is left"),
        "RuntimeError: no memory is left",
    ),
    "one of ours": (PipelineDriver, "draw", dpx.ConfigError("not so"), "ConfigError: not so"),
    "stopped": (PipelineDriver, "draw", KeyboardInterrupt(), "Generating was stopped."),
    "a full disk at the end": (module, "_tell", OSError(28, "No space left on device"), "No space left"),
}


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_after_the_charge_is_one_line(
    name: str,
    kept: bool,
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    own_process_ledger: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target, where, error, expected = FAILURES[name]
    start = [*DRAW, *PICTURE, "--prompt-file", prompt, "--json", *(["--keep", "kept"] if kept else [])]
    with monkeypatch.context() as patched:
        patched.setattr(target, where, fail(error))
        assert generate(models_folder, "plain", *start) == 1
    shown = capsys.readouterr()
    [line] = [x for x in shown.err.splitlines() if x.startswith("hf-dp-xattn: ")]
    assert line.startswith("hf-dp-xattn: Generating ") and expected in line
    assert "Traceback" not in shown.err and "The release was charged to 'l'" in line and charges() == 1
    folder = "kept" if kept else str(*(own_process_ledger / "hf_dp_xattn" / "releases").iterdir())
    assert line.endswith(f"is kept in {folder!r}: go on with --release {folder}, which costs nothing.")
    assert generate(models_folder, "plain", "--release", folder, *PICTURE, "--out", "a.png") == 0


def test_a_failure_inside_the_libraries(
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", fail(RuntimeError("no memory")))
    assert generate(models_folder, "plain", *DRAW, *PICTURE, "--prompt-file", prompt, "--keep", "k") == 1
    assert "(RuntimeError: no memory). The release was charged" in capsys.readouterr().err
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "batch_decode", fail(IndexError("beyond")))
    Path("l").unlink(), Path("l.key").unlink()  # it holds the text already: one budget on all hosts
    assert generate(models_folder, "bart", *SPEND, "--prompt-file", prompt) == 1
    assert "(IndexError: beyond). The release was charged" in capsys.readouterr().err


def test_a_message_from_before_the_release_is_not_shown(
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The private text takes part there, and a foreign message may quote it."""
    from hf_dp_xattn.hosts.making import LayerRecipe

    monkeypatch.setattr(LayerRecipe, "run", fail(RuntimeError("zebra quartz")))
    for start in (["generate", "--out", "a.png"], ["release", "--out", "made"]):
        Path("l").unlink(missing_ok=True), Path("l.key").unlink(missing_ok=True)
        more = [*start[1:], *SPEND, "--prompt-file", prompt, "--json"]
        assert main([start[0], str(models_folder / "plain"), *more]) == 1
        shown = capsys.readouterr()
        assert "Releasing failed (RuntimeError). The release was charged" in shown.err
        assert "zebra" not in shown.err + shown.out and "Traceback" not in shown.err and charges() == 1


@pytest.mark.parametrize("command", ["generate", "release"])
def test_a_release_that_cannot_be_written(
    command: str,
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Release, "save_pretrained", fail(OSError(28, "No space left on device")))
    where = ["--out", "a.png", "--keep", "kept"] if command == "generate" else ["--out", "kept"]
    more = [*where, *SPEND, "--prompt-file", prompt]
    assert main([command, str(models_folder / "plain"), *more]) == 1
    err = capsys.readouterr().err
    assert "Writing the release failed (OSError" in err and "was not kept and is lost" in err
    assert "Traceback" not in err and charges() == 1


def test_a_charge_that_may_have_been_made(
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dpx.Ledger, "charge_all", fail(OSError(28, "No space left on device")))
    assert generate(models_folder, "plain", *DRAW, "--prompt-file", prompt) == 1
    assert "The release may have been charged to 'l'" in capsys.readouterr().err


def test_what_fails_before_the_charge_is_not_said_to_be_charged(
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PipelineDriver, "release_text", fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        generate(models_folder, "plain", *DRAW, "--prompt-file", prompt)
    assert charges() == 0


def test_a_failure_with_a_saved_release_costs_nothing(
    models_folder: Path,
    prompt: str,  # noqa: F811
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["release", str(models_folder / "plain"), "--out", "r", *SPEND, "--prompt-file", prompt]) == 0
    start = ["--release", "r", "--out", "a.png", *PICTURE]
    monkeypatch.setattr(PipelineDriver, "draw", fail(MemoryError()))
    assert generate(models_folder, "plain", *start) == 1
    assert "Generating failed (MemoryError). Nothing was charged" in capsys.readouterr().err
    monkeypatch.setattr(PipelineDriver, "draw", fail(dpx.ReleaseError("it does not fit")))
    assert generate(models_folder, "plain", *start) == 2


@pytest.mark.parametrize("command", ["generate", "release"])
def test_the_help_says_what_its_exit_codes_mean(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([command, "--help"], ["--help"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "after a charge" in capsys.readouterr().out.replace("after the charge", "after a charge")
