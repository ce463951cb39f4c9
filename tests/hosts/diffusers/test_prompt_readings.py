"""Names of a prompt and of what its pipeline reads of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.prompt_readings import read_parts

from ...hosts_tiny import tiny_sd, tiny_sdxl
from ..text.pipelines import tiny_pixart, tiny_qwen, tiny_sd3
from .test_callers_code import protected_by

LONG = "red box blue dogs " * 300


def named(pipe: Any, text: str, units: list[str] | None = None) -> set[Any]:
    return set(read_parts(pipe, units or [text], text, apart=units is not None))


def cleans(pipe: Any) -> Any:
    """With a cleaning of markup and links, as pipelines of DeepFloyd's kin have when bs4 and ftfy are installed."""

    def clean(text: str, clean_caption: bool = False) -> list[str]:
        warnings.warn("The input looks like an address.", stacklevel=2)
        words = [w for w in text.split() if not w.startswith(("<", "http"))]
        return [" ".join(words) if clean_caption else text]

    pipe._text_preprocessing = clean
    return pipe


HEART = "\u2764"
TEXTS = ("red box", "red{special} box", LONG, "", "\ud800", HEART, "[eos] red", "<b> http://a.b &amp;")
ALIKE = {
    "special tokens": (tiny_sdxl, "red box", "red{special} box"),
    "markup": (lambda: cleans(tiny_pixart()), "red box", "<b> red box </b>"),
    "links": (lambda: cleans(tiny_pixart()), "red box", "red box http://a.b"),
    "how a letter is drawn": (tiny_sdxl, HEART + " red", HEART + "\ufe0f red"),
    "the end": (tiny_sdxl, LONG + "one", LONG + "another"),
}


@pytest.mark.parametrize("what", list(ALIKE))
def test_what_is_read_alike_has_a_name_in_common(what: str) -> None:
    make, one, other = ALIKE[what]
    pipe = make()
    other = other.format(special=pipe.tokenizer.all_special_tokens[0])
    assert named(pipe, one) & named(pipe, other)
    assert not named(pipe, one) & named(pipe, "blue box")


def test_units_have_names_as_they_are_read() -> None:
    pipe = cleans(tiny_pixart())
    one, other = ["red box", "dogs"], ["<b> red box", "dogs http://a.b"]
    both = named(pipe, ", ".join(one), one) & named(pipe, ", ".join(other), other)
    parts = {p for p in both if b"ids" not in p.name[0]}  # the tiny tokenizer knows few words
    assert parts
    assert not parts & named(pipe, "red box dogs", ["red", "box dogs"])


@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
@pytest.mark.parametrize("what", list(ALIKE))
def test_what_is_read_alike_is_one_account(what: str, mechanism: str) -> None:
    make, one, other = ALIKE[what]
    pipe = make()
    handle = protected_by(mechanism, pipe, unit="context")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dpx.TruncatedPromptWarning)
        handle.release(one)
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(other.format(special=pipe.tokenizer.all_special_tokens[0]))
    assert len(handle.report().releases) == 1


def test_no_warning_tells_what_a_prompt_looks_like() -> None:
    handle = protected_by("library", cleans(tiny_pixart()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.release("red box http://a.b")


def test_a_cleaning_that_fails_is_left_out() -> None:
    pipe = tiny_pixart()

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("red")

    pipe._text_preprocessing = fails
    assert named(pipe, "red box")


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_pixart, tiny_sd3, tiny_qwen])
def test_how_many_names_a_prompt_has_is_public(make: Any, apart: bool) -> None:
    pipe = make()
    counts = {len(named(pipe, text, [text] if apart else None)) for text in TEXTS}
    assert len(counts) == 1, counts


@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
@pytest.mark.parametrize("make", [tiny_sdxl, tiny_pixart])
def test_a_ledger_tells_nothing_by_its_length(make: Any, mechanism: str) -> None:
    lengths = set()
    for text in TEXTS:
        if not text:
            continue
        handle = protected_by(mechanism, make(), unit="context")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dpx.TruncatedPromptWarning)
            handle.release(text.format(special=""))
        lengths.add(len(handle.ledger.entries()))
    assert len(lengths) == 1, lengths


def test_a_tokenizer_keeps_nothing_of_a_prompt(tmp_path: Path) -> None:
    saved = []
    for text in ("red box", LONG):
        pipe = tiny_sdxl()
        protected_by("library", pipe, unit="context").release(text)
        folder = tmp_path / str(len(text))
        for name in ("tokenizer", "tokenizer_2"):
            getattr(pipe, name).save_pretrained(folder / name)
        saved.append({f.relative_to(folder): f.read_bytes() for f in sorted(folder.rglob("*.json"))})
    assert saved[0] == saved[1]


ODD = ("a red cat", "", "<|endoftext|>", LONG, "\u2764\ufe0f")


@pytest.mark.parametrize("groups", [None, "phrases"])
def test_a_ledger_of_stable_diffusion_tells_nothing_by_its_length(groups: str | None) -> None:
    lengths = set()
    for text in ODD if groups is None else (ODD[0], LONG):
        handle = protected_by("kernel_sum", tiny_sd(), unit="group" if groups else "context")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dpx.TruncatedPromptWarning)
            handle.release(text, groups=groups)
        lengths.add(len(handle.ledger.entries()))
    assert len(lengths) == 1, lengths


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_weights_are_not_told_by_how_many_names_there_are(make: Any) -> None:
    lengths = set()
    for parts in (["a", "red", "box"], ["a", ("red", 1.3)], [LONG, ("red", 1.3)]):
        handle = protected_by("kernel_sum", make(), unit="context")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dpx.TruncatedPromptWarning)
            handle.release(handle.private_encode(parts))
        lengths.add(len(handle.ledger.entries()))
    assert len(lengths) == 1, lengths
