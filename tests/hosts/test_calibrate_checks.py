"""What no calibration can be made of is refused at once: before anything is encoded or trained."""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import pytest
import torch
from transformers import TextGenerationPipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import calibrate as calibrating
from hf_dp_xattn.hosts.host_registry import kind_of

from .test_no_harm_by_host import HOSTS

CONFIG = dpx.DPXAttnConfig(mechanism="anchors", unit="row")
OPTIONS: list[dict[str, Any]] = [
    {"minutes": 0},
    {"minutes": float("nan")},
    {"steps": 0},
    {"steps": 1.5},
    {"steps": True},
    {"anchors": 0},
    {"memory_mb": 0},
    {"rank": -1},
    {"query_prompts": 0},
    {"query_steps": 0},
    {"queries_per_step": 0},
    {"seed": "x"},
    {"replies": -1},
    {"releases": ()},
    {"releases": ("sum", "summ")},
]


@pytest.fixture
def nothing_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> NoReturn:
        raise AssertionError("encoded")

    monkeypatch.setattr(
        calibrating, "kind_of", lambda model: dataclasses.replace(kind_of(model), public_data=never)
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.usefixtures("nothing_is_encoded")
def test_options(options: dict[str, Any]) -> None:
    make, public = HOSTS["decoder-only"]
    with pytest.raises(dpx.ConfigError, match=next(iter(options))):
        dpx.calibrate(make(), public(80), CONFIG, progress=False, **options)


@pytest.mark.parametrize("mechanism", ["anchors", "kernel_sum"])
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.usefixtures("nothing_is_encoded")
def test_contexts(name: str, mechanism: str) -> None:
    make, public = HOSTS[name]
    host, config = make(), CONFIG.replace(mechanism=mechanism)
    few = public(7)
    empty = {k: v[:0] for k, v in few.items()} if isinstance(few, dict) else few[:0]
    spoilt = torch.randn(80, 6, 16)
    spoilt[3, 2, 1] = float("nan")
    for wrong, why in (
        (few, "at least"),
        (empty, "at least"),
        ("one string", "list of contexts"),
        (5, "list of contexts"),
        ([1] * 80, "int"),
        ([None] * 80, "NoneType"),
        (torch.tensor(1.0), "dimension"),
        (spoilt, "NaN"),
    ):
        with pytest.raises(dpx.ConfigError, match=why):
            dpx.calibrate(host, wrong, config, progress=False)


@pytest.mark.parametrize("name", ["diffusers", "encoder-decoder"])
def test_rows_of_another_width(name: str) -> None:
    host = HOSTS[name][0]()
    with pytest.raises(dpx.ConfigError, match="7 channels"):
        dpx.calibrate(host, torch.randn(80, 16, 7), CONFIG, progress=False)


def test_one_release_by_its_name_and_a_pipeline_of_a_chat_model() -> None:
    """A text-generation pipeline is calibrated, and protected, as the model in it."""
    make, public = HOSTS["decoder-only"]
    model = make()

    class Words:  # a pipeline asks for no more of it
        model_max_length = 64

    pipe = TextGenerationPipeline.__new__(TextGenerationPipeline)
    pipe.model, pipe.tokenizer = model, Words()
    options: dict[str, Any] = {"epsilons": 8.0, "steps": 2, "releases": "sum", "progress": False}
    options |= {"query_prompts": 2, "query_steps": 2, "queries_per_step": 4}
    made = dpx.calibrate(pipe, public(70), CONFIG, **options)
    assert [p.release for p in made.plans] == ["sum"]
    with dpx.protect(pipe, CONFIG, calibration=made, allow_useless=True) as handle:
        assert handle.model is model
