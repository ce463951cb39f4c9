"""A pipeline with a second denoiser for later steps (Wan 2.2): both are proven before the first charge, and both read the release."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.diffusers.text_layers import TextLayer

from ...hosts_tiny import quiet
from ..text.pipelines import call, tiny_wan
from .test_placed_prompts import hold_the_release_fixed, protect

STEPS = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 512}


@pytest.fixture
def pipe() -> Any:
    parts = {**tiny_wan().components, "transformer_2": tiny_wan().transformer, "boundary_ratio": 0.5}
    return quiet(WanPipeline(**parts))


def counted(model: Any) -> list[int]:
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


def test_both_are_proven_once(pipe: Any) -> None:
    handle = protect(pipe, "kernel_sum")
    first, second = counted(pipe.transformer), counted(pipe.transformer_2)
    call(pipe, "a red circle", **STEPS)
    assert handle.host.proven == set(handle.host.models)
    assert first and second
    tried = len(first)
    call(pipe, "a red circle", **STEPS)
    assert len(first) < 2 * tried  # no further trial


def test_pictures_depend_on_the_release_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_the_release_fixed(monkeypatch)
    protect(pipe, "kernel_sum")
    one, other = (call(pipe, prompt, **STEPS) for prompt in ("a red circle", "two blue dogs in the rain"))
    assert torch.equal(one, other)


def test_a_second_one_that_reads_otherwise_is_refused_before_a_charge(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TextLayer.project

    def wrong(self: Any, rows: torch.Tensor) -> Any:
        key, value = original(self, rows)
        return (2 * key, 2 * value) if self.name.startswith("transformer_2") else (key, value)

    handle = protect(pipe, "kernel_sum")
    monkeypatch.setattr(TextLayer, "project", wrong)
    with pytest.raises(dpx.UnsupportedModelError, match="Nothing was spent"):
        call(pipe, "a red circle", **STEPS)
    assert not handle.report().releases
