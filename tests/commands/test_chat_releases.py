"""`hf-dp-xattn generate`: a release that was made with --chat is read with it, and one without it without."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dp_xattn.cli import main
from hf_dp_xattn.commands.generate_command import NOTE

from ..hosts.transformers.decoder_only.tiny import tiny as decoder_tiny
from .conftest import chat_tokenizer
from .test_generate import generate, saved  # noqa: F401 (a fixture)
from .test_release import KERNEL, prompt  # noqa: F401 (a fixture)

ASK = ["--public", "quartz zebra", "--new-tokens", "2", "--json"]
NO_HEAD = "{% for m in messages %}{{ m['content'] }} marzipan {% endfor %}"
OTHER_HEAD = "{% for m in messages %}{{ 'wyvern ' if m['role'] == 'system' else ' marzipan ' }}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def plain(models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the chat model that was made without --chat."""
    root = tmp_path_factory.mktemp("plain")
    (root / "prompt.txt").write_text("zebra quartz")
    start = ["release", str(models_folder / "chat"), "--out", str(root / "release"), *KERNEL, "--json"]
    assert main([*start, "--ledger", str(root / "l"), "--prompt-file", str(root / "prompt.txt")]) == 0
    return root / "release"


def test_made_with_chat(
    models_folder: Path,
    saved: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    start = ["--release", str(saved / "chat"), *ASK]
    assert generate(models_folder, "chat", *start) == 2
    shown = capsys.readouterr()
    assert "was made with --chat" in shown.err and "Give --chat here too" in shown.err and not shown.out
    assert generate(models_folder, "chat", *start, "--chat") == 0
    assert NOTE not in capsys.readouterr().err


def test_made_without_chat(models_folder: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["--release", str(plain), *ASK]
    assert generate(models_folder, "chat", *start, "--chat") == 2
    shown = capsys.readouterr()
    assert "was made without --chat" in shown.err and not shown.out
    assert generate(models_folder, "chat", *start) == 0
    assert NOTE not in capsys.readouterr().err


def model_with(template: str, folder: Path) -> Path:
    """The same weights; another template."""
    decoder_tiny("llama").save_pretrained(folder / "model")
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "model")
    return folder


def test_a_template_without_words_before_the_prompt(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Then nothing tells the two apart: a note."""
    folder = model_with(NO_HEAD, tmp_path)
    assert generate(folder, "model", "--release", str(plain), *ASK) == 0
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith(NOTE)] and "has a chat template" in err
    assert generate(folder, "model", "--release", str(plain), *ASK, "--chat") == 0
    assert NOTE not in capsys.readouterr().err


def test_a_template_that_has_changed_since(
    tmp_path: Path,
    saved: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another word of the same length: its rows are others."""
    folder = model_with(OTHER_HEAD, tmp_path)
    start = ["--release", str(saved / "chat"), *ASK]
    assert generate(folder, "model", *start, "--chat") == 0
    assert "are not those that the chat template gives now" in capsys.readouterr().err
    assert generate(folder, "model", *start) == 0
    assert "has a chat template" in capsys.readouterr().err


def test_no_template_no_note(
    models_folder: Path,
    saved: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate(models_folder, "llama", "--release", str(saved / "llama"), *ASK) == 0
    assert NOTE not in capsys.readouterr().err


def test_a_release_made_here_is_what_it_says(
    models_folder: Path,
    prompt: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i, more in enumerate(([], ["--chat"])):
        start = [*KERNEL, "--prompt-file", prompt, "--ledger", str(tmp_path / f"l{i}"), *ASK, *more]
        assert generate(models_folder, "chat", *start) == 0
        assert NOTE not in capsys.readouterr().err
