"""The public prompts that come with the package, and a calibration of a host without data."""

from __future__ import annotations

from typing import Any

import pytest

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.shipped_prompts import system_prompts
from hf_dp_xattn.hosts import calibrate as hosts_calibrate
from hf_dp_xattn.hosts.diffusers.phrases import split_phrases

from ..hosts.transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from ..hosts_tiny import tiny_sd

LIBRARY = dpx.DPXAttnConfig(mechanism="library", unit="group")


def test_system_prompts_leave_out_those_that_stand_for_private_ones() -> None:
    public = {tuple(p) for p in dpx.public_prompts()}
    held = {p.segments for p in system_prompts() if p.held_out}
    assert len(public) > 500 and len(held) > 50 and not public & held
    assert all(s.strip() and s.isascii() for p in public for s in p)


def test_picture_prompts_are_distinct_and_made_of_phrases() -> None:
    prompts = dpx.public_prompts("picture")
    assert len(set(prompts)) == len(prompts) == 3000
    assert all(2 <= len(split_phrases(p)) <= 4 for p in prompts)
    prompts.clear()  # a list of the caller's own
    assert len(dpx.public_prompts("picture")) == 3000


def test_another_kind_is_refused() -> None:
    with pytest.raises(dpx.ConfigError, match="picture"):
        dpx.public_prompts("poems")


def test_a_pipeline_needs_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def few(kind: str = "system") -> list[Any]:
        asked.append(kind)
        return dpx.public_prompts(kind)[:30]

    monkeypatch.setattr(hosts_calibrate, "public_prompts", few)
    library = dpx.calibrate(tiny_sd(), epsilons=8.0, progress=False)
    assert asked == ["picture"] and (library.mechanism, library.unit, library.grouping) == (
        "library",
        "group",
        "phrases",
    )
    shipped = {phrase for prompt in few("picture") for phrase in split_phrases(prompt)}
    assert set(library.texts) == shipped


def test_what_the_shipped_prompts_do_not_suit_is_refused() -> None:
    with pytest.raises(dpx.ConfigError, match="documents"):
        dpx.calibrate(seq2seq_tiny("bart"))
    with pytest.raises(dpx.ConfigError, match="only a library"):
        dpx.calibrate(tiny_sd(), None, LIBRARY.replace(mechanism="anchors"))
