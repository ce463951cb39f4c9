"""Names of a prompt and of what its pipeline reads of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.prompt_readings import read_parts

from ...hosts_tiny import tiny_sdxl
from ..text.pipelines import tiny_pixart
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


ALIKE = {
    "special tokens": (tiny_sdxl, "red box", "red{special} box"),
    "markup": (lambda: cleans(tiny_pixart()), "red box", "<b> red box </b>"),
    "links": (lambda: cleans(tiny_pixart()), "red box", "red box http://a.b"),
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
    parts = named(pipe, ", ".join(one), one) & named(pipe, ", ".join(other), other)
    assert parts
    assert not parts & named(pipe, "red box dogs", ["red", "box dogs"])


@pytest.mark.parametrize("mechanism", ["library", "kernel_sum"])
@pytest.mark.parametrize("what", ["special tokens", "markup", "links", "the end"])
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
