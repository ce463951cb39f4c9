"""Settings of `generate` and of training that a protected model takes, or refuses by name."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import _COMMON, generate, questions, tiny, tokens

OWN = tokens(5, 3)[None]


@pytest.fixture
def model() -> Any:
    return tiny("gemma2")


@pytest.mark.parametrize("kind", ["hybrid", "dynamic"])
@pytest.mark.parametrize("where", ["model", "config", "argument"])
def test_a_dynamic_cache_by_any_name(model: Any, kind: str, where: str, private: dpx.DPXAttnConfig) -> None:
    inputs = protect(model, private).release(tokens(9)).inputs(**questions())
    want = generate(model, inputs)
    options: dict[str, Any] = {}
    if where == "model":
        model.generation_config.cache_implementation = kind
    elif where == "config":
        config = copy.deepcopy(model.generation_config)
        config.cache_implementation = kind
        options = {"generation_config": config}
    else:
        options = {"cache_implementation": kind}
    got = generate(model, inputs, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def _soft(kind: str, model: Any) -> Any:
    made = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "p": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }
    return peft.get_peft_model(model, made[kind]()).eval()


@pytest.mark.parametrize("kind", ["prompt", "p", "prefix"])
@pytest.mark.parametrize("own", [1, 5])
def test_prompt_learning_around_a_protected_model(kind: str, own: int, private: dpx.DPXAttnConfig) -> None:
    base = tiny("llama")
    soft = _soft(kind, base)
    inputs = protect(base, private).release(tokens(9)).inputs(input_ids=OWN[:, :own])
    with pytest.raises(dpx.DPXAttnError):
        soft.generate(**inputs, max_new_tokens=2)
    with pytest.raises(dpx.DPXAttnError):
        soft(**inputs)


def test_what_drops_tokens_on_the_way_is_named(private: dpx.DPXAttnConfig) -> None:
    base = tiny("llama")
    inputs = protect(base, private).release(tokens(9)).inputs(input_ids=OWN)
    prepare = base.prepare_inputs_for_generation

    def cut(ids: Any, **kwargs: Any) -> Any:
        return {**prepare(ids, **kwargs), "input_ids": ids[:, -1:]}

    base.prepare_inputs_for_generation = cut
    with pytest.raises(dpx.ProtectionLostError, match=r"5 own tokens .* 1 of them"):
        base.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_is_refused_by_name(when: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    if when == "before":
        model.gradient_checkpointing_enable()
    release = protect(model, private).release(tokens(9))
    model.gradient_checkpointing_enable()
    inputs = release.inputs(input_ids=OWN)
    with torch.no_grad():
        want = model(**release.inputs(input_ids=OWN)).logits
    model.train()
    with pytest.raises(dpx.ConfigError, match="Gradient checkpointing"):
        model(**inputs, labels=OWN)
    with torch.no_grad():
        assert torch.equal(model.eval()(**release.inputs(input_ids=OWN)).logits, want)
    model.train().gradient_checkpointing_disable()
    model(**release.inputs(input_ids=OWN), labels=OWN).loss.backward()


@pytest.mark.parametrize(
    "option",
    [{"max_length": 30}, {"min_length": 7}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}],
    ids=str,
)
def test_settings_that_do_not_see_the_prefix_are_named_once(
    option: dict[str, Any], private: dpx.DPXAttnConfig
) -> None:
    model = tiny("llama")
    inputs = protect(model, private).release(tokens(9)).inputs(input_ids=OWN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(**inputs, max_new_tokens=2, max_length=None, repetition_penalty=1.0)
    with pytest.warns(UserWarning, match=f"{next(iter(option))}.*prefix is not among"):
        model.generate(**inputs, **option)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model.generate(**inputs, **option)
    assert not any("not among" in str(w.message) for w in seen)


def test_models_that_also_read_pictures_are_refused(private: dpx.DPXAttnConfig) -> None:
    text = {**_COMMON, "num_key_value_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
    }
    config = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    model = tf.Qwen2_5_VLForConditionalGeneration(config).eval()
    with pytest.raises(dpx.UnsupportedModelError, match="pixel_values"):
        dpx.protect(model, private)
    assert dpx.handle_of(model) is None


def test_a_release_is_read_inside_public_too(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    handle = protect(model, private)
    release = handle.release(tokens(9))
    want = generate(model, release.inputs(input_ids=OWN))
    with handle.public():
        inputs = release.inputs(input_ids=OWN)
        for _ in range(2):  # the same inputs serve again
            got = generate(model, inputs)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        with pytest.raises(dpx.ConfigError, match="guidance_scale"):
            generate(model, inputs, guidance_scale=2.0)
