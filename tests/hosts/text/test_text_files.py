"""Releases of texts on disk (JSON alone), protected hosts that are saved and restored, and the command line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import TextGenerationPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.cli import main
from hf_dp_xattn.commands.read_artefact import read_artefact
from hf_dp_xattn.privacy.bits import SeededEntropy

from ...hosts_tiny import picture, tiny_sd
from ..transformers.decoder_only import tiny as decoder
from ..transformers.encoder_decoder import tiny as seq2seq
from .libraries import LINES, PHRASES, answer_with, config, library
from .pipelines import tiny_flux
from .words import tokenizer

SECRET = "a purple cross, under water"
JSON = "dp_xattn_release.json"


def test_a_release_is_one_json_file_for_any_host(tmp_path: Path) -> None:
    pipe = tiny_sd()
    protected = dpx.protect(pipe, config(), calibration=library(pipe))
    release = protected.release([SECRET, "a dog"])
    release.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {JSON, "README.md"}
    written = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "purple" not in written and all(t in written for text in release.texts for t in text)
    bare = dpx.Release.from_pretrained(tmp_path, host=None)
    assert bare.texts == release.texts and [str(t) for t in bare.texts] == [str(t) for t in release.texts]
    assert bare.guarantees == release.guarantees and bare.terms.public == release.terms.public
    kind, file = read_artefact(str(tmp_path))
    assert kind == "release" and list(release.texts[0]) == file.report().releases[0]["text"]
    assert release.texts[0][0] in str(file.report())

    other = tiny_flux()
    loaded = dpx.Release.from_pretrained(tmp_path, host=other)
    assert loaded.inputs() == {"prompt": [str(t) for t in release.texts]}
    handle = dpx.handle_of(other)
    assert [r["name"] for r in handle.report().releases] == [
        "loaded",
        "loaded",
    ] and handle.calibration is None
    with pytest.raises(dpx.ConfigError, match="library"):
        handle.release("a secret")
    with pytest.raises(dpx.ConfigError, match="library"):
        other("a secret", num_inference_steps=1)
    model = decoder.tiny("llama")
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer())
    inputs = dpx.Release.from_pretrained(tmp_path, host=pipeline).inputs(input_ids=torch.tensor([[9]]))
    assert len(model.generate(**inputs, max_new_tokens=1)) == 2


def test_all_that_is_published_is_equal_for_neighbours(tmp_path: Path) -> None:
    """With the answers held fixed: the files, the report and the inputs tell nothing else."""
    published = []
    for i, secret in enumerate((SECRET, "the code is 123456, at midnight")):
        pipe = tiny_sd()
        protected = dpx.protect(pipe, config(), calibration=library(pipe), ledger=dpx.Ledger())
        answer_with(protected, "at night", "on wood")
        release = protected.release(secret)
        folder = release.save_pretrained(tmp_path / str(i))
        files = {p.name: p.read_bytes() for p in folder.iterdir()}
        pipe.save_pretrained(tmp_path / "pipe" / str(i))
        beside = tmp_path / "pipe" / str(i) / "dp_xattn"
        saved = {p.name: p.read_bytes() for p in beside.iterdir()}
        told = (str(protected.report()), protected.report().to_json(), repr(release), repr(protected))
        published.append((files, saved, told, release.inputs(), release.inputs(prompt="in snow")))
    assert published[0] == published[1]


def test_other_kinds_of_release_are_refused(tmp_path: Path) -> None:
    pipe = tiny_sd()
    dpx.protect(pipe, config(), calibration=library(pipe)).release(SECRET).save_pretrained(tmp_path / "texts")
    dpx.unprotect(pipe)
    kernel = dpx.DPXAttnConfig(unit="row", mechanism="kernel_sum", degree=1, projection_dim=4)
    sums = dpx.protect(pipe, kernel, ledger=dpx.Ledger()).release(SECRET)
    sums.save_pretrained(tmp_path / "sums")
    with pytest.raises(dpx.ReleaseError, match="no texts"):
        _ = sums.text
    with pytest.raises(dpx.ReleaseError, match="texts"):
        dpx.Release.from_pretrained(tmp_path / "texts", host=pipe)
    dpx.unprotect(pipe)
    by_text = dpx.protect(pipe, config(), calibration=library(pipe))
    with pytest.raises(dpx.ConfigError, match="released text only"):
        by_text.encoding()
    with pytest.raises(dpx.ReleaseError, match="not of texts"):
        dpx.Release.from_pretrained(tmp_path / "sums", host=pipe)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    pipe = tiny_sd()
    seeded = dpx.protect(pipe, config(), calibration=library(pipe), entropy=SeededEntropy(0))
    with pytest.raises(dpx.ReleaseError, match="seeded"):
        seeded.release(SECRET).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    dpx.unprotect(pipe)
    dpx.protect(pipe, config(), calibration=library(pipe)).release(SECRET).save_pretrained(tmp_path)
    good = (tmp_path / JSON).read_text()
    for old, new in (
        ('"texts"', '"tensors"'),
        (json.dumps(PHRASES[0])[:3], '"x'),
        ('"epsilon": 8.0', '"epsilon": 1.0'),
        ('"joint": ", "', '"joint": 5'),
    ):
        (tmp_path / JSON).write_text(good.replace(old, new))
        with pytest.raises(dpx.ReleaseError):
            dpx.Release.from_pretrained(tmp_path, host=None)
    with pytest.raises(dpx.ReleaseError):
        dpx.Release.from_pretrained(tmp_path / "nothing", host=None)


def test_protected_hosts_come_back(tmp_path: Path) -> None:
    pipe = tiny_sd()
    ledger = dpx.Ledger()
    made = library(pipe)
    protected = dpx.protect(pipe, config(), calibration=made, ledger=ledger)
    protected.release(SECRET)
    pipe.save_pretrained(tmp_path / "pipe")
    again = dpx.from_pretrained(tmp_path / "pipe", ledger=ledger)
    handle = dpx.handle_of(again)
    assert isinstance(again, StableDiffusionPipeline) and handle.calibration.texts == made.texts
    with pytest.raises(dpx.BudgetExceededError):
        again(SECRET, num_inference_steps=1)
    assert picture(again, "another, secret") is not None
    model, words = decoder.tiny("llama"), tokenizer()
    lines = library(model, LINES, tokenizer=words, grouping="lines")
    dpx.protect(model, config(), calibration=lines, tokenizer=words)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(dpx.ConfigError, match="tokenizer"):
        dpx.from_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    model = dpx.from_pretrained(tmp_path / "model")
    assert len(dpx.handle_of(model).release("the code is secret").text) == 1
    assert dpx.handle_of(model).release("close at five").inputs(input_ids=[9])["input_ids"].shape[1] > 1


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A pipeline, a chat model and an encoder-decoder model, each with a library."""
    tiny_sd().save_pretrained(tmp_path / "pipe")
    for name, model in (("chat", decoder.tiny("llama")), ("documents", seq2seq.tiny("bart"))):
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "phrases.txt").write_text("\n".join(f"{a}, {b}" for a, b in itertools.pairwise(PHRASES)))
    (tmp_path / "lines.txt").write_text("\n".join(LINES))
    (tmp_path / "private.txt").write_text("wumpus")
    return tmp_path


def _run(*arguments: Any) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("name", ["pipe", "chat", "documents"])
def test_the_command_line(name: str, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = folders / ("phrases.txt" if name == "pipe" else "lines.txt")
    model, made, kept = folders / name, folders / "library", folders / "kept"
    options = ["--mechanism", "library", "--unit", "group", "--epsilons", 8, "--json", "--out", made]
    assert _run("calibrate", model, "--public", public, *options) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plans"][0]["texts"] >= 2 and 0 <= told["plans"][0]["distortion"] <= 2
    own = [
        "--calibration",
        made,
        "--epsilon",
        8,
        "--ledger",
        folders / "ledger.json",
        "--prompt-file",
        folders / "private.txt",
    ]
    assert _run("release", model, *own, "--out", kept) == 0
    assert "released text: " in capsys.readouterr().out
    assert _run("release", model, *own, "--out", folders / "second") == 1
    assert _run("report", kept) == 0
    shown = capsys.readouterr().out
    assert "released text: " in shown and "wumpus" not in shown
    how = {
        "pipe": ["--out", folders / "a.png", "--steps", 1, "--public", "in snow"],
        "chat": ["--public", "be open", "--new-tokens", 2, "--chat"],
        "documents": ["--public", "be open", "--new-tokens", 2],
    }[name]
    assert _run("generate", model, "--release", kept, *how, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert ("texts" in found) == (name != "pipe") and "guarantees" in found
    if name == "pipe":
        assert (folders / "a.png").is_file()
    assert (
        _run("calibrate", model, "--public", public, "--anchors", 16, *options[:4], "--out", folders / "x")
        == 2
    )
    no_library = ["--mechanism", "anchors", "--unit", "group", "--expand", "--out", folders / "x"]
    assert _run("calibrate", model, "--public", public, *no_library) == 2
    more = [*options[:6], "--grouping", "lines", "--expand", "--out", folders / "more"]
    assert _run("calibrate", model, "--public", public, *more) == 0
    assert read_artefact(str(folders / "more"))[1].grouping == "lines"
    assert _run("release", model, *own, "--prefix-bucket", 4, "--out", folders / "y") == 2
    if name == "pipe":
        assert _run("bench", model, *own[:4]) == 2
        assert "no step differs" in capsys.readouterr().err


def test_a_chat_on_the_command_line_is_the_pipelines() -> None:
    """The head of the template, the released text and the user's turn make the ids of the filled template."""
    from hf_dp_xattn.hosts.transformers.model_texts import chat_head, read_question

    model = decoder.tiny("llama")
    words = tokenizer()
    protected = dpx.protect(
        model, config(), calibration=library(model, LINES, tokenizer=words), tokenizer=words
    )
    answer_with(protected, "close at five")
    release = protected.release("a secret")
    head, question = chat_head(words), read_question(words, "be open", chat=True)
    inputs = release.inputs(input_ids=question, public_head=head)
    chat = [{"role": "system", "content": "close at five"}, {"role": "user", "content": "be open"}]
    want = words.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert inputs["input_ids"][0].tolist() == list(want)
