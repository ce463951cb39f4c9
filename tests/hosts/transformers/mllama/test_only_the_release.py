"""Invariant 1: with the release held fixed, two private images give bitwise equal outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.placeholder import CODE_CHANNELS
from hf_dp_xattn.hosts.releases import Releases
from hf_dp_xattn.hosts.transformers.encoder_decoder import cross_attention as attention

from ...fail_closed import refused_logits
from .protecting import MECHANISMS, charges, protect
from .tiny import generate, images, texts, tiny


def hold_the_release_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image gets what the first one released: what differs afterwards did not come through the release."""
    original, first = Releases.run, []

    def fixed(self: Any, *args: Any) -> Any:
        result = original(self, *args)  # so that any way past the release would run
        first.append(result)
        return dataclasses.replace(result, structures=first[0].structures, context=first[0].context)

    monkeypatch.setattr(Releases, "run", fixed)


def check_equal_outputs(model: Any, **options: Any) -> None:
    (ids_a, scores_a), (ids_b, scores_b) = (
        generate(model, {**images(1, seed), **texts(1)}, num_beams=2, **options) for seed in (3, 4)
    )
    assert bool((scores_a[0] > -torch.inf).any()) and not bool(scores_a.isnan().any())
    assert torch.equal(ids_a, ids_b) and torch.equal(scores_a, scores_b)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_outputs_depend_on_the_release_alone(
    mechanism: str, cache: bool, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny()
    handle = protect(model, private.replace(mechanism=mechanism))
    hold_the_release_fixed(monkeypatch)
    check_equal_outputs(model, use_cache=cache)
    assert len(handle.report().releases) == 2


def test_a_planted_leak_is_caught(private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vision model's output of the last image is kept aside, and one function reads it."""
    model = tiny()
    handle = dpx.protect(model, private)
    hold_the_release_fixed(monkeypatch)
    kept, read = [], attention.read
    model.model.vision_model.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    monkeypatch.setattr(attention, "read", lambda *args: read(*args) + 1e-3 * kept[-1].mean())
    with pytest.raises(AssertionError):
        check_equal_outputs(model)
    assert charges(handle) == [1, 1]


def test_the_text_model_never_receives_a_private_row(private: dpx.DPXAttnConfig) -> None:
    """What enters it is the placeholder; keys and values of its cache are NaN altogether, and the vision model does not run."""
    model = tiny()
    handle = dpx.protect(model, private)
    inputs = handle.release(**images()).inputs(**texts())
    seen: list[torch.Tensor] = []
    for module in model.model.language_model.modules():
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.extend(
                t.detach() for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)
            ),
            with_kwargs=True,
        )
    vision: list[Any] = []
    model.model.vision_model.register_forward_hook(lambda *a: vision.append(a))
    out = model.generate(
        **inputs, max_new_tokens=3, num_beams=2, return_dict_in_generate=True, output_hidden_states=True
    )
    placeholders = [t for t in seen if t.shape[:2] == (4, 2) and t.is_floating_point()]
    assert placeholders and not vision
    for tensor in placeholders:
        assert bool(tensor[:, 1:].isnan().all()) and bool(tensor[:, 0, CODE_CHANNELS:].isnan().all())
    for layer in (1, 3):
        cached = out.past_key_values.layers[layer]
        assert cached.keys.shape[2] == 2  # filled once, whatever the number of steps and rows
        assert bool(cached.keys.isnan().all() and cached.values.isnan().all())


def test_a_layer_that_lost_its_attention_function_gives_nan(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private)
    inputs = handle.release(**images()).inputs(**texts(mask=False))
    layer = next(iter(handle.layers))
    handle.layers[layer].module.config = handle.host.originals[layer]
    with pytest.raises(dpx.ProtectionLostError, match="attention function"):
        model(**inputs)
    handle.guard.check = lambda: None  # and with the gate's eyes shut
    shown = inputs["attention_mask"].bool()
    assert bool(refused_logits(model, inputs)[shown].isnan().all())


def test_a_layer_that_is_given_other_rows_gives_nan(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private)
    inputs = handle.release(**images()).inputs(**texts())

    def swap(module: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs["cross_attention_states"]  # our own runs of the layer, on public rows, are left alone
        new = torch.randn(2, 10, 32) if bool(states.isnan().any()) else states
        return args, {**kwargs, "cross_attention_states": new}

    layer = model.model.language_model.layers[1].cross_attn
    layer.register_forward_pre_hook(swap, with_kwargs=True)
    assert bool(refused_logits(model, inputs).isnan().all())
