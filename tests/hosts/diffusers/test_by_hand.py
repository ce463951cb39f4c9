"""A private prompt that the caller encodes: prompt weighting, without declaring it public."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from ...hosts_tiny import CHANNELS, LENGTH, latents, picture, tiny_unet
from ..transformers.encoder_decoder.tiny import one, tiny

PROMPT = "a red circle"


def weighted(pipe: Any) -> torch.Tensor:
    """What a weighting library does."""
    ids = pipe.tokenizer(PROMPT, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    rows: torch.Tensor = pipe.text_encoder(ids)[0]
    return rows * torch.linspace(0.9, 1.1, LENGTH)[:, None]


def test_the_private_way_is_named_first(pipe: Any, private: Any) -> None:
    dpx.protect(pipe, private)
    with pytest.raises(dpx.ProtectionLostError) as caught:
        weighted(pipe)
    told = str(caught.value)
    assert "PRIVATE" in told and told.index("encoding()") < told.index("public()")


def test_weighted_prompts_are_private_contexts(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with handle.encoding():
        rows = weighted(pipe)
    assert handle.ledger.entries() == ()
    assert bool(picture(pipe, prompt_embeds=rows, negative_prompt="ugly").isfinite().all())
    picture(pipe, prompt_embeds=rows)
    assert len(handle.report().releases) == 1
    with pytest.raises(dpx.BudgetExceededError):
        handle.release(rows, fresh=True)


def test_exact_rows_are_drawn_exactly(pipe: Any, exact: Any) -> None:
    """Parity: the same picture as of an unprotected pipeline."""
    with torch.no_grad():
        want = picture(pipe, prompt_embeds=weighted(pipe), negative_prompt="ugly")
    handle = dpx.protect(pipe, exact)
    with handle.encoding(), torch.no_grad():
        rows = weighted(pipe)
    assert torch.allclose(want, picture(pipe, prompt_embeds=rows, negative_prompt="ugly"), atol=1e-4)


def test_nothing_else_is_opened(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with handle.encoding():
        rows = weighted(pipe)
        with pytest.raises(dpx.ProtectionLostError):
            pipe.unet(latents(), 5, rows)
        assert bool(picture(pipe, prompt_embeds=rows).isfinite().all())
    assert len(handle.report().releases) == 1
    with pytest.raises(dpx.ProtectionLostError):
        weighted(pipe)


def test_a_document_encoded_by_hand(private: Any) -> None:
    model = tiny("bart")
    handle = dpx.protect(model, private)
    with handle.encoding():
        states = model.get_encoder()(**one("bart"))
    tokens = model.generate(encoder_outputs=states, max_new_tokens=3)
    assert tokens.shape[0] == 1 and len(handle.report().releases) == 1


def test_a_bare_unet_has_nothing_to_encode(private: Any) -> None:
    handle = dpx.protect(tiny_unet(), private)
    with handle.encoding(), pytest.raises(dpx.ProtectionLostError):
        handle.model(latents(), 5, torch.randn(1, LENGTH, CHANNELS))
