"""`hf-dp-xattn release`: the private text comes in by a file, a pipe or a hidden prompt, and is nowhere afterwards."""

from __future__ import annotations

import getpass
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.commands.models import load_plain
from hf_dp_xattn.hosts.storage import ReleaseFile
from hf_dp_xattn.hosts.transformers.model_texts import read_prefix

from ..hub.hosts import SECRET, files
from ..private_content import PrivateContent, check_clean
from .conftest import chat_tokenizer, word_tokenizer

KERNEL = ["--mechanism", "kernel_sum", "--epsilon", "4"]
GROUP = [*KERNEL, "--unit", "group"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def arguments(models: Path, out: Path, model: str = "plain", *more: str) -> list[str]:
    ledger = str(out.parent / "ledger.json")
    return ["release", str(models / model), "--out", str(out), "--ledger", ledger, *more]


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    """A file with the private text."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "prompt.txt"
    path.write_text(SECRET + "\n")
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "release"


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("plain", KERNEL),
        ("plain", ["--config", "config"]),
        ("plain", ["--mechanism", "anchors", "--epsilon", "8", "--calibration", "calibration"]),
        ("protected", []),
        ("bart", KERNEL),
        ("llama", KERNEL),
        ("llama", [*KERNEL, "--unit", "context"]),
        ("bart", GROUP),
        ("llama", GROUP),
        ("chat", [*KERNEL, "--chat", "--prefix-bucket", "8"]),
        ("chat", [*GROUP, "--chat"]),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) or "as saved",
)
def test_each_kind_of_host(
    model: str, more: list[str], models_folder: Path, prompt: str, out: Path, capfd: Any
) -> None:
    folders = [str(models_folder / x) if x in ("config", "calibration") else x for x in more]
    assert main([*arguments(models_folder, out, model, *folders), "--prompt-file", prompt, "--json"]) == 0
    shown = capfd.readouterr()
    values = json.loads(shown.out)
    assert values["folder"] == str(out) and values["report"]["releases"][0]["charges"] == 1
    release = ReleaseFile.load(out)
    assert release.contexts[0].guarantee.is_private
    blobs = {**files(out.parent), "stdout": shown.out.encode(), "stderr": shown.err.encode()}
    check_clean(blobs, PrivateContent(texts=(SECRET,)))


def test_what_was_released_can_be_drawn(models_folder: Path, prompt: str, out: Path) -> None:
    main([*arguments(models_folder, out, "plain", *KERNEL), "--prompt-file", prompt])
    from ..hosts_tiny import picture, tiny_sd

    pipe = tiny_sd()
    release = dpx.Release.from_pretrained(out, host=pipe)
    assert bool(picture(pipe, **release.inputs()).isfinite().all())


@pytest.mark.parametrize("way", ["pipe", "dash", "hidden"])
def test_ways_in(way: str, models_folder: Path, out: Path, monkeypatch: Any, capsys: Any) -> None:
    asked = []
    monkeypatch.setattr(getpass, "getpass", lambda text: asked.append(text) or SECRET)
    monkeypatch.setattr("sys.stdin", Terminal() if way == "hidden" else io.StringIO(SECRET + "\n"))
    more = ["--prompt-file", "-"] if way == "dash" else []
    assert main([*arguments(models_folder, out, "plain", *KERNEL), *more]) == 0
    assert bool(asked) == (way == "hidden")
    shown = capsys.readouterr()
    assert "differentially private" in shown.out and "releasing" in shown.err


def test_the_same_text_by_another_way_is_charged_once(models_folder: Path, prompt: str, out: Path) -> None:
    """The last line break of a file is not part of the context: the ledger knows it again, and refuses."""
    start = arguments(models_folder, out, "plain", *KERNEL)
    assert main([*start, "--prompt-file", prompt]) == 0
    bare = Path(prompt).with_name("bare.txt")
    bare.write_text(SECRET)
    again = arguments(models_folder, out.with_name("again"), "plain", *KERNEL)
    assert main([*again, "--prompt-file", str(bare)]) == 1
    assert not out.with_name("again").exists()  # no empty folder is left


@pytest.mark.parametrize("model", ["plain", "llama"])  # the second one's tokenizer takes a mark for a word
def test_a_byte_order_mark_gives_no_second_budget(model: str, models_folder: Path, out: Path) -> None:
    statuses = []
    for name, text in (("once", "zebra quartz\n"), ("again", "\ufeffzebra quartz\r\n")):
        file = out.with_name(f"{name}.txt")
        file.write_bytes(text.encode())
        start = arguments(models_folder, out.with_name(name), model, *KERNEL, "--unit", "context")
        statuses.append(main([*start, "--prompt-file", str(file)]))
    assert statuses == [0, 1]


@pytest.mark.parametrize("unit", ["context", "group"])
@pytest.mark.parametrize("order", [("llama", "bart", "plain"), ("plain", "chat"), ("bart", "llama")], ids=str)
def test_a_text_has_one_budget_on_all_models(
    order: tuple[str, ...], unit: str, models_folder: Path, prompt: str, out: Path
) -> None:
    """It is charged as the text that it is, beside its token ids: these are others for each tokenizer and template."""
    for number, model in enumerate(order):
        more = [*KERNEL, "--unit", unit, *(["--chat"] if model == "chat" else [])]
        start = arguments(models_folder, out.with_name(model), model, *more)
        assert main([*start, "--prompt-file", prompt]) == (1 if number else 0)
    assert {c.number_of_releases for c in dpx.Ledger(out.parent / "ledger.json").entries()} == {1}


@pytest.mark.parametrize("data", [b"the caf\xe9 is zebra", SECRET.encode("utf-16")])
def test_bytes_that_are_no_text(
    data: bytes, models_folder: Path, out: Path, monkeypatch: Any, capsys: Any
) -> None:
    """As under LC_ALL=C, where standard input lets them through as lone surrogates."""
    raw = io.TextIOWrapper(io.BytesIO(data), encoding="ascii", errors="surrogateescape")
    monkeypatch.setattr("sys.stdin", raw)
    assert main(arguments(models_folder, out, "plain", *KERNEL)) == 2
    shown = capsys.readouterr().err
    assert (
        "UTF-8" in shown
        and "nothing was spent" in shown
        and "zebra" not in shown
        and "Traceback" not in shown
    )


def test_a_prompt_among_the_arguments_is_not_repeated(models_folder: Path, out: Path, capsys: Any) -> None:
    start = arguments(models_folder, out, "plain", *KERNEL)
    for wrong in ([SECRET], ["--prompt", SECRET], [f"--prompt={SECRET}"]):
        with pytest.raises(SystemExit) as stop:
            main([*start, *wrong])
        assert stop.value.code == 2
        assert "zebra" not in "".join(capsys.readouterr())
    assert main([*start, "--prompt-file", SECRET]) == 2
    err = capsys.readouterr().err
    assert "zebra" not in err and "NAME" in err
    assert not (out.parent / "ledger.json").exists()


BAD: dict[str, tuple[str, list[str], str]] = {
    "no price": ("plain", [], "--epsilon"),
    "a price and a config": ("plain", [*KERNEL, "--config", "x"], "not both"),
    "settings of a protected one": ("protected", KERNEL, "protected already"),
    "no such model": ("nothing", KERNEL, "could not be read"),
    "no model": ("config", KERNEL, "config.json"),
    "no calibration": ("plain", ["--mechanism", "anchors", "--epsilon", "8"], "calibration"),
    "a bad type": ("plain", [*KERNEL, "--dtype", "int8"], "--dtype"),
    "a bad epsilon": ("plain", ["--epsilon", "-1"], "epsilon"),
    "a chat of a picture": ("plain", [*KERNEL, "--chat"], "decoder-only"),
    "a bucket of a document": ("bart", [*KERNEL, "--prefix-bucket", "8"], "decoder-only"),
    "a bucket that is too small": ("llama", [*KERNEL, "--prefix-bucket", "1"], "prefix_bucket"),
    "a chat without a template": ("llama", [*KERNEL, "--chat"], "chat template"),
    "a model that reads images": ("mllama", KERNEL, "image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, models_folder: Path, prompt: str, out: Path, capsys: Any) -> None:
    model, more, expected = BAD[name]
    assert main([*arguments(models_folder, out, model, *more), "--prompt-file", prompt]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err
    ledger = out.parent / "ledger.json"
    assert not ledger.exists() or dpx.Ledger(ledger).entries() == ()


def segments_of_a_decoder(handle: Any, lines: list[str]) -> dpx.Release:
    parts = [word_tokenizer()(line).input_ids for line in lines]
    return handle.release(parts, groups="segments")


def segments_of_a_chat(handle: Any, lines: list[str]) -> dpx.Release:
    split = dpx.split_chat(chat_tokenizer(), [{"role": "system", "content": "\n".join(lines)}])
    assert len(split.head) == 1 and len(split.segments) == len(lines)
    return handle.release(list(split.segments), groups="segments", public_head=split.head)


def documents_of_an_encoder(handle: Any, lines: list[str]) -> dpx.Release:
    batch = word_tokenizer()(lines, padding=True, return_tensors="pt")
    return handle.release(input_ids=batch.input_ids, attention_mask=batch.attention_mask, groups="documents")


UNITS: dict[str, Callable[[Any, list[str]], dpx.Release]] = {
    "llama": segments_of_a_decoder,
    "chat": segments_of_a_chat,
    "bart": documents_of_an_encoder,
}


@pytest.mark.parametrize("model", UNITS)
def test_lines_are_units(model: str, models_folder: Path, out: Path, tmp_path: Path) -> None:
    """The same context as the library's, of segments or documents that are encoded apart: one ledger knows it again. Empty lines and the
    space around a line are no part of it."""
    file = tmp_path / "lines.txt"
    file.write_text("\n zebra quartz\r\n\njukebox wyvern zebra  \nquartz")
    more = ["--chat"] if model == "chat" else []
    start = arguments(models_folder, out, model, *GROUP, *more, "--prompt-file", str(file), "--json")
    assert main(start) == 0
    assert ReleaseFile.load(out).contexts[0].guarantee.unit == "group"
    ledger = dpx.Ledger(out.parent / "ledger.json")
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", epsilon=4.0, unit="group")
    host = load_plain(str(models_folder / model), torch.float32)
    with dpx.protect(host, config, ledger=ledger) as handle:
        with pytest.raises(dpx.BudgetExceededError):
            UNITS[model](handle, ["zebra quartz", "jukebox wyvern zebra", "quartz"])
        with pytest.raises(dpx.BudgetExceededError) if model == "bart" else nullcontext():
            UNITS[model](handle, ["zebra quartz", "jukebox wyvern"])  # a document of it was released before
        UNITS[model](handle, ["zebra wyvern", "jukebox wyvern"])


@pytest.mark.parametrize("adds", [False, True], ids=["no BOS", "BOS"])
def test_what_is_public_of_a_prefix_does_not_depend_on_it(adds: bool, tmp_path: Path) -> None:
    """A private text that begins with BOS itself: a token of it is public only where the tokenizer put it there."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if adds:
        bos = ("<s>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    for text in ("zebra", "<s> zebra"):
        prefix = read_prefix(tokenizer, text, chat=False)
        assert len(prefix.head) == adds and len(prefix.context) == len(text.split())
        apart = read_prefix(tokenizer, [text, "quartz"], chat=False)
        assert len(apart.head) == adds and [len(s) for s in apart.context] == [len(text.split()), 1]


@pytest.mark.parametrize("text", ["", "\n", "  \n", "\xff"])
def test_texts_that_are_none(text: str, models_folder: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode("latin-1"))
    assert main([*arguments(models_folder, out, "plain", *KERNEL), "--prompt-file", str(path)]) == 2
    assert "nothing was spent" in capsys.readouterr().err


def test_an_earlier_release_is_not_overwritten(models_folder: Path, prompt: str, out: Path) -> None:
    start = [*arguments(models_folder, out, "plain", *KERNEL), "--prompt-file", prompt]
    assert main(start) == 0
    before = files(out)
    Path(prompt).write_text("another")
    assert main(start) == 2
    charges = dpx.Ledger(out.parent / "ledger.json").entries()
    assert files(out) == before and {c.number_of_releases for c in charges} == {1}


def test_the_help_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["release", "--help"])
    out = capsys.readouterr().out
    assert "history" in out and "process table" in out and "never an argument" in out
