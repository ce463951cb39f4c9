"""Invariant 1: with the release held fixed, two private documents give bitwise equal outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.placeholder import CODE_CHANNELS
from hf_dp_xattn.hosts.releases import Releases
from hf_dp_xattn.hosts.transformers.encoder_decoder import cross_attention as attention
from hf_dp_xattn.hosts.transformers.encoder_decoder.encoder_decoder_host import PLACEHOLDER_ROWS

from ...fail_closed import refused_logits
from .calibrations import protect
from .tiny import BUILDERS, documents, generate, one, tiny

MECHANISMS = ("none", "kernel_sum", "dptree", "anchors")


def hold_the_release_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context gets what the first one released: what differs afterwards did not come through the release."""
    original, first = Releases.run, []

    def fixed(self: Any, *args: Any) -> Any:
        result = original(self, *args)  # so that any way past the release would run
        first.append(result)
        return dataclasses.replace(result, structures=first[0].structures, context=first[0].context)

    monkeypatch.setattr(Releases, "run", fixed)


def check_equal_outputs(name: str, model: Any, **options: Any) -> None:
    (ids_a, scores_a), (ids_b, scores_b) = (
        generate(model, one(name, seed), num_beams=2, **options) for seed in (3, 4)
    )
    assert bool((scores_a[0] > -torch.inf).any()) and not bool(scores_a.isnan().any())
    assert torch.equal(ids_a, ids_b) and torch.equal(scores_a, scores_b)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_outputs_depend_on_the_release_alone(
    name: str, mechanism: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    protect(model, private.replace(mechanism=mechanism))
    hold_the_release_fixed(monkeypatch)
    check_equal_outputs(name, model)


def test_a_planted_leak_is_caught(private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's output of the last document is kept aside, and one function reads it."""
    model = tiny("bart")
    handle = dpx.protect(model, private)
    hold_the_release_fixed(monkeypatch)
    kept, read = [], attention.read
    model.get_encoder().register_forward_hook(lambda m, a, out: kept.append(out[0]))
    monkeypatch.setattr(attention, "read", lambda *args: read(*args) + 1e-3 * kept[-1][0, 0, 0])
    with pytest.raises(AssertionError):
        check_equal_outputs("bart", model)
    assert len(handle.report().releases) == 2


@pytest.mark.parametrize("name", ["bart", "t5", "bert2gpt2", "bert2bert_wider"])
def test_the_decoder_never_receives_a_private_row(name: str, private: dpx.DPXAttnConfig) -> None:
    """What enters decoder modules is the placeholder: NaN but for its marker; keys and values are NaN altogether."""
    model, inputs = tiny(name), one(name)
    channels = model.get_encoder()(**inputs)[0].shape[-1]
    handle = dpx.protect(model, private)
    release = handle.release(**inputs)  # which runs the layers' projections on the rows
    seen: list[torch.Tensor] = []
    decoder = model.get_decoder() if not name.startswith("bert") else model.decoder
    for module in decoder.modules():
        module.register_forward_hook(
            lambda m, args, kwargs, out: seen.extend(
                t.detach() for t in (*args, *kwargs.values(), out) if isinstance(t, torch.Tensor)
            ),
            with_kwargs=True,
        )
    generate(model, inputs)
    generate(model, release.inputs(), num_beams=2)
    shaped = [t for t in seen if t.ndim == 3 and t.shape[1:] == (PLACEHOLDER_ROWS, channels)]
    assert len(seen) > 100 and (shaped or name == "bert2bert_wider")
    for tensor in shaped:
        assert bool(tensor[:, 1:].isnan().all()) and bool(tensor[:, 0, CODE_CHANNELS:].isnan().all())


def test_outputs_carry_the_placeholder_only(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    dpx.protect(model, private)
    out = model.generate(
        **one("bart"),
        max_new_tokens=3,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert out.encoder_hidden_states is None and out.encoder_attentions is None
    cross = out.past_key_values.cross_attention_cache
    assert all(bool(layer.keys.isnan().all() and layer.values.isnan().all()) for layer in cross.layers)
    assert all(a is None for step in out.cross_attentions or () for a in step or ())


def test_what_a_logits_processor_reads_is_not_the_document(private: dpx.DPXAttnConfig) -> None:
    """n-grams of the document would be banned from the answer, which tells them."""
    model = tiny("blenderbot")
    model.generation_config.encoder_no_repeat_ngram_size = 1
    handle = dpx.protect(model, private)
    ids = torch.arange(4, 60).unsqueeze(0)
    with handle.public():
        told = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert not set(told[0, 1:].tolist()) & set(ids[0].tolist())
    assert set(tokens[0, 1:].tolist()) & set(ids[0].tolist())
    assert any("encoder_no_repeat_ngram_size" in w for w in handle.report().warnings)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_layer_that_lost_its_attention_function_gives_nan(name: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = dpx.protect(model, private)
    inputs = handle.release(**one(name)).inputs(decoder_input_ids=torch.tensor([[4, 5]]))
    layer = next(iter(handle.layers))
    handle.layers[layer].module.config = handle.host.originals[layer]
    with pytest.raises(dpx.ProtectionLostError, match="attention function"):
        model(**inputs)
    handle.guard.check = lambda: None  # and with the gate's eyes shut
    assert bool(refused_logits(model, inputs).isnan().all())


def test_a_layer_that_is_given_other_rows_gives_nan(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    handle = dpx.protect(model, private)
    inputs = handle.release(**documents("bart")).inputs(decoder_input_ids=torch.tensor([[4], [5]]))

    def swap(module: Any, args: Any, kwargs: Any) -> Any:
        states = kwargs["key_value_states"]  # our own runs of the layer, on public rows, are left alone
        return args, {
            **kwargs,
            "key_value_states": torch.randn(2, 7, 16) if bool(states.isnan().any()) else states,
        }

    model.model.decoder.layers[0].encoder_attn.register_forward_pre_hook(swap, with_kwargs=True)
    assert bool(refused_logits(model, inputs).isnan().all())
