"""A generation config that is passed leaves what it does not say to the model's own: both are looked at before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_dp_xattn as dpx

from .decoder_only import tiny as decoders
from .encoder_decoder import tiny as encoder_decoders
from .mllama import tiny as mllama

Run = Callable[..., Any]


def _bart(private: dpx.DPXAttnConfig, name: str = "bart") -> tuple[Any, Any, Run]:
    model = encoder_decoders.tiny(name)
    handle = dpx.protect(model, private)
    return model, handle, lambda **o: model.generate(**encoder_decoders.one(name), **o)


def _mllama(private: dpx.DPXAttnConfig) -> tuple[Any, Any, Run]:
    model = mllama.tiny()
    handle = dpx.protect(model, private)
    return model, handle, lambda **o: model.generate(**mllama.images(1), **mllama.texts(1), **o)


def _decoder(private: dpx.DPXAttnConfig, name: str = "llama") -> tuple[Any, Any, Run]:
    model = decoders.tiny(name)
    handle = dpx.protect(model, dpx.DPXAttnConfig(unit="row", mechanism="none"))
    release = handle.release(decoders.tokens(64, 1))
    ids = decoders.tokens(6, 7)[None]
    return model, handle, lambda **o: model.generate(**release.inputs(input_ids=ids), **o)


HOSTS = {"bart": _bart, "mllama": _mllama, "llama": _decoder}
EVERYWHERE: dict[str, Any] = {
    "guidance_scale": 3.0,
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
}
CASES = [
    *((host, name, value) for host in HOSTS for name, value in EVERYWHERE.items()),
    ("bart", "encoder_repetition_penalty", 1e4),
    ("mllama", "encoder_repetition_penalty", 1e4),
    ("llama", "use_cache", False),
]


@pytest.mark.parametrize(("host", "name", "value"), CASES)
def test_the_models_own_settings_count_beside_a_config_that_is_passed(
    host: str, name: str, value: Any, private: dpx.DPXAttnConfig
) -> None:
    model, handle, run = HOSTS[host](private)
    before = len(handle.report().releases)
    setattr(model.generation_config, name, value)
    passed = GenerationConfig(max_new_tokens=3)
    with pytest.raises(dpx.ConfigError, match=f"{name}.*not supported"):
        run(generation_config=passed)
    assert len(handle.report().releases) == before
    assert getattr(passed, name) is None and getattr(model.generation_config, name) == value


def test_what_a_passed_config_says_counts_before_the_models_own(private: dpx.DPXAttnConfig) -> None:
    model, _, run = _bart(private)
    model.generation_config.guidance_scale = 3.0
    run(generation_config=GenerationConfig(max_new_tokens=2, guidance_scale=1.0))


def test_the_models_own_length_counts_for_its_window(private: dpx.DPXAttnConfig) -> None:
    model, _, run = _decoder(private, "mistral_window")
    model.generation_config.max_new_tokens = 500
    seen: list[Any] = []

    class Streamer:
        put = staticmethod(seen.append)

        def end(self) -> None: ...

    with pytest.raises(dpx.ConfigError, match="window"):
        run(generation_config=GenerationConfig(min_new_tokens=400), streamer=Streamer())
    assert not seen


def test_what_is_no_generation_config(private: dpx.DPXAttnConfig) -> None:
    for build in HOSTS.values():
        _, handle, run = build(private)
        before = len(handle.report().releases)
        with pytest.raises(dpx.ConfigError, match="GenerationConfig"):
            run(generation_config={"max_new_tokens": 2})
        assert len(handle.report().releases) == before


@pytest.mark.parametrize("ids", [[[5, 999]], [[5, -1]], [[5.0, 6.0]], [[True, False]]], ids=str)
def test_public_ids_that_are_none_of_the_models(ids: Any, private: dpx.DPXAttnConfig) -> None:
    with dpx.protect(decoders.tiny("llama"), private, ledger=dpx.Ledger()) as handle:
        release = handle.release(decoders.tokens(9))
        with pytest.raises(dpx.ConfigError, match=r"input_ids.*token ids"):
            release.inputs(input_ids=torch.tensor(ids))
    with dpx.protect(encoder_decoders.tiny("bart"), private, ledger=dpx.Ledger()) as handle:
        release = handle.release(**encoder_decoders.one("bart"))
        with pytest.raises(dpx.ConfigError, match=r"decoder_input_ids.*token ids"):
            release.inputs(decoder_input_ids=torch.tensor(ids))
        with pytest.raises(dpx.DPXAttnError, match="oken ids"):
            release.inputs(input_ids=torch.tensor(ids))
