"""Weights that change without torch counting it (a fused optimiser's step, an EMA's copy, `.data`) are noticed on every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn import ReleaseError
from hf_dp_xattn.hosts.weight_changes import checksum, stamp

from ..hosts_tiny import latents, picture, tiny_sd
from .anchor_calibrations import calibration_for
from .test_stale_encodings import HOSTS, IDS
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny

NONE = dpx.DPXAttnConfig(unit="row", mechanism="none")


def fused(weights: Iterable[Any]) -> None:
    weights = list(weights)
    for w in weights:
        w.grad = torch.ones_like(w)
    torch.optim.AdamW(weights, lr=0.3, fused=True).step()
    for w in weights:
        w.grad = None


def ema(weights: Iterable[Any]) -> None:
    weights = list(weights)
    average = EMAModel(weights)
    for shadow in average.shadow_params:
        shadow.add_(0.3)
    average.copy_to(weights)


def in_data(weights: Iterable[Any]) -> None:
    for w in weights:
        w.data.add_(0.3)


CHANGES = [fused, ema, in_data]
change_by = pytest.mark.parametrize("change", CHANGES)


@change_by
@pytest.mark.parametrize("name", HOSTS)
def test_an_encoding_of_the_old_weights_is_not_served(name: str, change: Callable[..., None]) -> None:
    make, release, encoder_of = HOSTS[name]
    host = make()
    config = NONE.replace(unit="group" if name == "phrases" else "row")
    with dpx.protect(host, config, ledger=dpx.Ledger()) as handle:
        before = release(handle).contexts[0]
        assert release(handle).contexts[0] is before
        change(encoder_of(host).parameters())
        assert release(handle).contexts[0] is not before
        assert len(handle.releases.spent) == 2


@change_by
def test_a_picture_is_of_the_text_encoder_as_it_is(change: Callable[..., None]) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    with dpx.protect(pipe, NONE, ledger=dpx.Ledger()):
        before = picture(pipe, "a cat")
        for each in (pipe, plain):
            change(each.text_encoder.parameters())
        after = picture(pipe, "a cat")
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, picture(plain, "a cat"), atol=1e-4, rtol=1e-3)


@change_by
def test_inputs_of_a_prefix_are_refused_once_the_weights_have_changed(change: Callable[..., None]) -> None:
    model, ids = decoder_tiny("llama"), torch.arange(4, 10).unsqueeze(0)
    with dpx.protect(model, NONE, ledger=dpx.Ledger()) as handle:
        release = handle.release(IDS)
        inputs = release.inputs(input_ids=ids)
        change(model.parameters())
        with pytest.raises(ReleaseError, match="differ"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ReleaseError, match="differ"):
            model(**release.inputs(input_ids=ids))


def test_a_prefix_is_refused_at_the_forward_behind_a_fused_step() -> None:
    model, ids = decoder_tiny("llama"), torch.arange(4, 10).unsqueeze(0)
    with dpx.protect(model, NONE, ledger=dpx.Ledger()) as handle:
        inputs = handle.release(IDS).inputs(input_ids=ids)
        fused(model.parameters())
        with pytest.raises(ReleaseError, match="differ"):
            model(**inputs)


@change_by
def test_generate_of_bart_is_of_the_weights_as_they_are(change: Callable[..., None]) -> None:
    model, plain = seq2seq_tiny("bart"), seq2seq_tiny("bart")
    options: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with dpx.protect(model, NONE, ledger=dpx.Ledger()) as handle:
        model.generate(input_ids=IDS.unsqueeze(0), **options)
        for each in (model, plain):
            change(each.parameters())
        after = model.generate(input_ids=IDS.unsqueeze(0), **options)
        assert len(handle.releases.spent) == 2
    want = plain.generate(input_ids=IDS.unsqueeze(0), **options)
    torch.testing.assert_close(torch.cat(after.logits), torch.cat(want.logits), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_loop_of_an_encoder_decoder_reads_the_weights_behind_a_step(name: str) -> None:
    model = seq2seq_tiny(name)
    start = torch.full((1, 1), 2)
    with dpx.protect(model, NONE, ledger=dpx.Ledger()) as handle, torch.no_grad():
        release = handle.release(torch.randn(1, 6, handle.host.channels))
        inputs = release.inputs(decoder_input_ids=start)
        before = model(**inputs).logits
        fused([p for c in handle.layers.values() for p in c.module.parameters()])
        looped, refused = None, False
        try:
            looped = model(**inputs).logits
        except ReleaseError:
            refused = True
        assert refused or not torch.allclose(before, looped)


def test_a_loop_of_a_unet_reads_the_weights_behind_a_step() -> None:
    pipe = tiny_sd()
    config = dpx.DPXAttnConfig(unit="row", mechanism="anchors", epsilon=8.0, delta=1e-5)
    with dpx.protect(pipe, config, calibration=calibration_for(pipe), ledger=dpx.Ledger()) as handle:
        inputs = handle.release("a cat").inputs()["prompt_embeds"]
        with torch.no_grad():
            before = pipe.unet(latents(), 9, encoder_hidden_states=inputs).sample
            fused([a.module.to_k.weight for a in handle.layers.values()])
            looped = pipe.unet(latents(), 9, encoder_hidden_states=inputs).sample
            fresh = pipe.unet(latents(), 9, encoder_hidden_states=inputs.clone()).sample
        assert not torch.equal(before, looped)
        torch.testing.assert_close(looped, fresh)


def test_a_stamp_shows_a_fused_step_of_its_own_weights_only() -> None:
    own, other = nn.Linear(3, 3), nn.Linear(3, 3)
    before = stamp([own])
    fused(other.parameters())
    assert stamp([own]) == before
    fused(own.parameters())
    assert stamp([own]) != before


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.uint8]


@given(
    dtype=st.sampled_from(DTYPES), rows=st.integers(1, 70), columns=st.integers(1, 70), place=st.integers(0)
)
def test_one_bit_of_one_weight_changes_the_sum(
    dtype: torch.dtype, rows: int, columns: int, place: int
) -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.zeros(rows, columns).to(dtype), requires_grad=False)
    before = checksum([module])
    assert checksum([module]) == before
    raw = module.weight.data.view(torch.uint8).reshape(-1)
    raw[place % len(raw)] ^= 1
    assert checksum([module]) != before


def test_rows_that_change_places_change_the_sum() -> None:
    module = nn.Embedding(300, 64)
    before = checksum([module])
    module.weight.data[[0, 1]] = module.weight.data[[1, 0]]
    assert checksum([module]) != before


@pytest.mark.parametrize("layout", ["turned", "channels last", "cut", "empty", "offloaded"])
def test_weights_of_any_layout_are_summed(layout: str) -> None:
    module = nn.Module()
    weight = {
        "turned": lambda: torch.randn(5, 7).mT,
        "channels last": lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "cut": lambda: torch.randn(41)[3:],
        "empty": lambda: torch.randn(0, 3),
        "offloaded": lambda: torch.randn(4, 3, device="meta"),
    }[layout]()
    module.weight = nn.Parameter(weight)
    module.other = nn.Parameter(torch.ones(1))
    before = checksum([module])
    module.other.data.add_(1.0)
    assert checksum([module]) != before
    if layout not in ("empty", "offloaded"):
        before = checksum([module])
        module.weight.data[-1].add_(1.0)
        assert checksum([module]) != before
