"""Texts and libraries that are odd or wrong: the right answer or a clear error, with nothing spent."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.library.library_fit import build_library

from ...hosts_tiny import picture, tiny_sd
from .libraries import config, library


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_sd()


@pytest.mark.parametrize(
    ("public", "message"),
    [
        ([], "2 to 1048576"),
        (["a star"], "2 to 1048576"),
        (["a star", "a star"], "2 to 1048576"),
        (["a star", ""], "Public context 1 "),
        (["a star", b"bytes"], "Public context 1 "),
        ([["a star", ""]], "Public context 0 "),
        ([[f"text {i}" for i in range(2**17 + 1)]], "more than 131072"),
    ],
    ids=["empty", "one", "duplicates", "no text", "bytes", "empty unit", "too many units"],
)
def test_bad_public_contexts_make_no_library(pipe: Any, public: list[Any], message: str) -> None:
    with pytest.raises(dpx.ConfigError, match=message):
        dpx.calibrate(pipe, public, dpx.DPXAttnConfig(epsilon=8.0), epsilons=8.0, progress=False)


def test_more_texts_than_a_library_holds() -> None:
    public = [[f"text {i}" for i in range(start, start + 2**16)] for start in range(0, 2**20 + 1, 2**16)]
    with pytest.raises(dpx.ConfigError, match="2 to 1048576"):
        build_library(public, encode_nothing, dpx.DPXAttnConfig(epsilon=8.0))


def encode_nothing(texts: Any) -> Any:
    raise AssertionError("nothing is encoded before the number of texts is looked at")


def test_odd_texts_are_released_like_any(pipe: Any) -> None:
    """A public text word for word, one that is longer than the host reads, one without tokens, one that is no valid Unicode."""
    ledger = dpx.Ledger()
    shelf = library(pipe)
    with dpx.protect(pipe, epsilon=90.0, calibration=shelf, ledger=ledger) as handle:
        assert tuple(handle.release("a red circle, in snow").text) == ("a red circle", "in snow")
        for odd in ("a very long prompt " * 60, "\u200b", "\ud800 x"):
            assert set(handle.release(odd).text) <= set(shelf.texts)
        spent = len(ledger.entries())
        for bad in ("", " , ", "\ufeff", b"bytes", None, [[1, 2]], torch.tensor([1, 2])):
            with pytest.raises(dpx.ContextError, match=r"othing was spent"):
                handle.release(bad)
        assert len(ledger.entries()) == spent


def test_a_library_of_another_encoder_is_refused_and_nothing_is_patched(pipe: Any) -> None:
    """What another tokenizer or model made has other codes, or codes of another width."""
    shelf, ledger = library(pipe), dpx.Ledger()
    exact = picture(pipe, "a red circle")
    others = (shelf.probe.flip(1), "other codes"), (shelf.probe[:, :-1], "have .* numbers, this one gives")
    for probe, message in others:
        wide = probe.shape[1]
        other = dataclasses.replace(
            shelf, probe=probe, center=shelf.center[:wide], projection=shelf.projection[:wide]
        )
        with pytest.raises(dpx.ConfigError, match=message):
            dpx.protect(pipe, epsilon=8.0, calibration=other, ledger=ledger)
    assert not ledger.entries() and torch.equal(picture(pipe, "a red circle"), exact)


def test_a_long_public_text_may_answer(pipe: Any) -> None:
    long = "a very long prompt with many words " * 40
    public = [[long, "a red circle"], ["a star", "in snow"]]
    shelf = dpx.calibrate(pipe, public, dpx.DPXAttnConfig(epsilon=8.0), epsilons=8.0, progress=False)
    assert long.strip() in shelf.texts
    with dpx.protect(pipe, epsilon=90.0, calibration=shelf, ledger=dpx.Ledger()) as handle:
        assert handle.release(long.replace("many", "some")).text[0] == long.strip()
        assert picture(pipe, long).isfinite().all()


@pytest.mark.parametrize("groups", ["documents", "context", "foo"])
def test_units_other_than_those_that_are_answered_are_refused(pipe: Any, groups: str) -> None:
    protected = dpx.protect(pipe, config(), calibration=library(pipe), ledger=dpx.Ledger())
    with pytest.raises(dpx.ConfigError, match="names other units"):
        protected.release("a red circle, in snow", groups=groups)
    assert not protected.report().releases
    assert len(protected.release("a red circle, in snow", groups="phrases").text) == 2
    dpx.unprotect(pipe)
