"""Whisper cuts a recording into segments by its length, which a placeholder does not have: refused by name, before the charge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_dp_xattn as dpx

from .tiny import documents, one, tiny


@pytest.fixture
def model() -> Any:
    model = tiny("whisper")
    known = {
        "no_timestamps_token_id": 40,
        "lang_to_id": {"<|en|>": 30, "<|de|>": 31},
        "task_to_id": {"transcribe": 33, "translate": 34},
        "is_multilingual": True,
        "prev_sot_token_id": 36,
        "alignment_heads": [[0, 0]],
    }
    for name, value in known.items():
        setattr(model.generation_config, name, value)
    return model


REFUSED: dict[str, Any] = {
    "return_timestamps": True,
    "return_segments": True,
    "monitor_progress": print,
    "logprob_threshold": -1.0,
    "compression_ratio_threshold": 1.35,
    "no_speech_threshold": 0.6,
    "temperature": (0.0, 0.2, 0.4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_the_length_is_refused(name: str, model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    inputs: list[dict[str, Any]] = [one("whisper"), handle.release(**one("whisper", seed=9)).inputs()]
    before = len(handle.report().releases)
    for given in inputs:
        with pytest.raises(dpx.ConfigError, match=f"{name}.*not supported"):
            model.generate(**given, max_new_tokens=6, language="en", **{name: REFUSED[name]})
    assert len(handle.report().releases) == before


@pytest.mark.parametrize("name", [n for n in REFUSED if n.endswith(("timestamps", "threshold"))])
@pytest.mark.parametrize("passed", [True, False])
def test_it_is_refused_in_the_models_own_settings(
    name: str, passed: bool, model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(model, private)
    setattr(model.generation_config, name, REFUSED[name])
    options = {"generation_config": GenerationConfig(max_new_tokens=6)} if passed else {"max_new_tokens": 6}
    with pytest.raises(dpx.ConfigError, match=name):
        model.generate(**one("whisper"), language="en", **options)
    assert not handle.report().releases


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language": "en", "task": "transcribe", "return_timestamps": False},
        {"language": "de", "temperature": [0.0], "return_segments": False},
    ],
    ids=["language detected", "named", "one temperature"],
)
def test_what_does_not_read_it_is_that_of_the_unprotected_model(
    options: dict[str, Any], batch: int, model: Any, exact: dpx.DPXAttnConfig
) -> None:
    given = {n: v[:batch] for n, v in documents("whisper").items()}
    model.generation_config.suppress_tokens = list(range(40, 60))  # as without timestamps
    want = model.generate(**given, max_new_tokens=6, **options)
    dpx.protect(model, exact)
    assert torch.equal(model.generate(**given, max_new_tokens=6, **options), want)
