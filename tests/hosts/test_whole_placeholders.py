"""A placeholder is read as it was made or refused: what was joined to it, cut off or changed would have no effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.placeholder import (
    CODE_CHANNELS,
    MAGIC,
    is_marked,
    make_placeholder,
    new_tag,
    read_tags,
)

from ..hosts_tiny import CHANNELS, LENGTH, picture, tiny_sd
from .transformers.encoder_decoder import tiny as seq2seq
from .transformers.mllama import tiny as images


def _replaced(states: torch.Tensor, row: int, channel: int, value: float) -> torch.Tensor:
    states = states.clone()
    states[:, row, channel] = value
    return states


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "public rows behind": lambda p: torch.cat([p, torch.ones_like(p)], 1),
    "public rows before": lambda p: torch.cat([torch.ones_like(p), p], 1),
    "public rows on both sides": lambda p: torch.cat([torch.ones_like(p), p, torch.ones_like(p)], 1),
    "a public row within": lambda p: torch.cat([p[:, :1], torch.ones_like(p[:, :1]), p[:, 1:]], 1),
    "itself behind": lambda p: torch.cat([p, p], 1),
    "empty rows behind": lambda p: torch.cat([p, torch.full_like(p, torch.nan)], 1),
    "rows cut off": lambda p: p[:, :-1],
    "the first row cut off": lambda p: p[:, 1:],
    "weighted": lambda p: p * 1.1,
    "averaged with public rows": lambda p: 0.5 * p + 0.5,
    "masked": lambda p: p.nan_to_num(0.0),
    "one number changed": lambda p: _replaced(p, -1, -1, 0.5),
    "one number of the first row changed": lambda p: _replaced(p, 0, -1, 0.5),
    "one digit changed": lambda p: _replaced(p, 0, CODE_CHANNELS - 1, 1.5),
    "channels padded": lambda p: F.pad(p, (0, 4)),
    "channels padded with NaN": lambda p: F.pad(p, (0, 4), value=torch.nan),
    "channels cut off": lambda p: p[..., :-1],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rows", [2, LENGTH])
def test_a_changed_placeholder_is_no_placeholder(change: str, rows: int) -> None:
    whole = make_placeholder([new_tag(), new_tag()], rows, CHANNELS, torch.float32, "cpu")
    assert bool(is_marked(whole).all())
    changed = CHANGES[change](whole)
    assert not bool(is_marked(changed).any())
    with pytest.raises(dpx.DPXAttnError, match="not whole"):
        read_tags(changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts_repetition_and_public_elements_are_permitted(dtype: torch.dtype) -> None:
    tags = [new_tag(), new_tag()]
    whole = make_placeholder(tags, LENGTH, CHANNELS, torch.float32, "cpu")
    batch = torch.cat([torch.randn(1, LENGTH, CHANNELS), whole.repeat_interleave(2, 0)]).to(dtype)
    assert read_tags(batch) == [None, tags[0], tags[0], tags[1], tags[1]]


@pytest.mark.parametrize("change", CHANGES)
def test_a_pipeline_and_its_unet_refuse_it(change: str, private: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd()
    with dpx.protect(pipe, private, ledger=dpx.Ledger()) as handle:
        whole = handle.release("a red circle").inputs()["prompt_embeds"]
        charged = handle.ledger.entries()
        changed = CHANGES[change](whole)
        with pytest.raises(dpx.DPXAttnError):
            picture(pipe, prompt_embeds=changed, guidance_scale=1.0)
        with pytest.raises(dpx.DPXAttnError):
            handle.release(changed)
        public = torch.ones(1, *changed.shape[1:])
        for states in (changed, torch.cat([public, changed]), torch.cat([changed, public])):
            with pytest.raises(dpx.DPXAttnError):
                pipe.unet(torch.zeros(len(states), 4, 8, 8), 1, encoder_hidden_states=states)
        if changed.shape == whole.shape:
            with pytest.raises(dpx.DPXAttnError):
                picture(pipe, prompt_embeds=whole, negative_prompt_embeds=changed)
        assert handle.ledger.entries() == charged
        assert bool(picture(pipe, prompt_embeds=whole, num_images_per_prompt=2).isfinite().all())


@pytest.mark.parametrize("change", CHANGES)
def test_models_of_transformers_refuse_it(change: str, private: dpx.DPXAttnConfig) -> None:
    model = seq2seq.tiny("bert2bert_wider")
    with dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        whole = handle.release(**seq2seq.one("bert2bert_wider")).inputs()["encoder_outputs"][0]
        changed = CHANGES[change](whole)
        with pytest.raises(dpx.DPXAttnError):
            model.generate(encoder_outputs=(changed,), max_new_tokens=2)
        with pytest.raises(dpx.DPXAttnError):
            model(encoder_outputs=(changed,), decoder_input_ids=torch.tensor([[2]]))
    model = images.tiny()
    with dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        inputs = handle.release(**images.images(1)).inputs(**images.texts(1))
        changed = CHANGES[change](inputs["cross_attention_states"])
        with pytest.raises(dpx.DPXAttnError):
            model(**{**inputs, "cross_attention_states": changed})
        with pytest.raises(dpx.DPXAttnError):
            model.generate(**{**inputs, "cross_attention_states": changed}, max_new_tokens=2)


@pytest.mark.parametrize("mask", [torch.tensor([[1, 0]]), torch.ones(1, 7, dtype=torch.int64)])
def test_a_mask_over_a_release_is_refused(mask: torch.Tensor, private: dpx.DPXAttnConfig) -> None:
    model = seq2seq.tiny("bart")
    with dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        inputs = {**handle.release(**seq2seq.one("bart")).inputs(), "attention_mask": mask}
        with pytest.raises(dpx.ConfigError, match="attention_mask"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(dpx.ConfigError, match="attention_mask"):
            model(**inputs, decoder_input_ids=torch.tensor([[2]]))


def _write(buffer: torch.Tensor, states: torch.Tensor) -> None:
    """Past what torch counts, as static input buffers are filled."""
    version = buffer._version
    buffer.data.copy_(states)
    assert buffer._version == version


def test_a_buffer_of_a_unet_is_read_anew(private: dpx.DPXAttnConfig) -> None:
    pipe, x, t = tiny_sd(), torch.zeros(1, 4, 8, 8), torch.tensor(5)
    with torch.no_grad(), dpx.protect(pipe, private, ledger=dpx.Ledger()) as handle:
        one, two = (handle.release(s).inputs()["prompt_embeds"] for s in ("a cat", "a dog under the moon"))
        buffer = one.clone()
        first = pipe.unet(x, t, buffer).sample
        _write(buffer, two)
        second = pipe.unet(x, t, buffer).sample
        assert not torch.equal(first, second)
        assert torch.equal(second, pipe.unet(x, t, two.clone()).sample)
        _write(buffer, torch.randn_like(two))
        with pytest.raises(dpx.ProtectionLostError, match="none is a placeholder"):
            pipe.unet(x, t, buffer)


def test_a_buffer_that_nobody_waits_for_gives_nan(
    private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device within a pipeline's call, which looks for NaN at its end."""
    pipe, x, t = tiny_sd(), torch.zeros(1, 4, 8, 8), torch.tensor(5)
    with torch.no_grad(), dpx.protect(pipe, private, ledger=dpx.Ledger()) as handle:
        one, two = (handle.release(s).inputs()["prompt_embeds"] for s in ("a cat", "a dog under the moon"))
        monkeypatch.setattr(handle.host.gate, "_may_wait", lambda states: False)
        buffer = one.clone()
        with handle.host.gate.inside_pipeline():
            pipe.unet(x, t, buffer)
            assert bool(pipe.unet(x, t, buffer).sample.isfinite().all())
            _write(buffer, two)
            assert bool(pipe.unet(x, t, buffer).sample.isnan().all())
            assert bool(pipe.unet(x, t, one).sample.isfinite().all())


def test_a_buffer_of_a_model_is_read_anew(private: dpx.DPXAttnConfig) -> None:
    model, ids = seq2seq.tiny("bart"), torch.tensor([[2, 5]])
    with torch.no_grad(), dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        one, two = (
            handle.release(**seq2seq.one("bart", seed)).inputs()["encoder_outputs"][0] for seed in (1, 2)
        )
        buffer = one.clone()
        first = model(encoder_outputs=(buffer,), decoder_input_ids=ids).logits
        _write(buffer, two)
        second = model(encoder_outputs=(buffer,), decoder_input_ids=ids).logits
        assert not torch.equal(first, second)
        assert torch.equal(second, model(encoder_outputs=(two.clone(),), decoder_input_ids=ids).logits)
        _write(buffer, torch.randn_like(two))
        with pytest.raises(dpx.ProtectionLostError, match="without the placeholder"):
            model(encoder_outputs=(buffer,), decoder_input_ids=ids)


def test_finite_rows_are_no_placeholder_whatever_they_hold(private: dpx.DPXAttnConfig) -> None:
    """No row decides whether a release succeeds, but for one that begins with all fifteen numbers of a placeholder."""
    handle = dpx.protect(tiny_sd().unet, private)
    rows = torch.randn(2, 16, CHANNELS)
    rows[0, 5, : len(MAGIC)] = torch.tensor(MAGIC, dtype=rows.dtype)
    rows[1, 0, : len(MAGIC)] = torch.tensor(MAGIC, dtype=rows.dtype)
    assert len(handle.release(rows)) == 2 and read_tags(rows) == [None, None]


@pytest.mark.parametrize("public", [False, True])
def test_nan_of_a_text_encoder_is_named(public: bool, private: dpx.DPXAttnConfig) -> None:
    """It overflows on the negative prompt, or on a text that was declared public; before anything is charged."""
    pipe = tiny_sd()
    with dpx.protect(pipe, private, ledger=dpx.Ledger()) as handle:
        pipe.text_encoder.register_forward_hook(
            lambda module, args, out: type(out)(last_hidden_state=out[0] * torch.nan)
        )
        with pytest.raises(dpx.DPXAttnError, match="text encoder that overflows"):
            if public:
                with handle.public():
                    picture(pipe, "a cat")
            else:
                picture(pipe, "a cat", negative_prompt="a dog", guidance_scale=3.0)
        assert not handle.ledger.entries()
