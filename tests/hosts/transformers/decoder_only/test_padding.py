"""Texts that come without a mask: pads are left out where the unprotected model leaves them out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import hf_dp_xattn as dpx

from .tiny import generate, questions, tiny, tokens

PREFIX = 11


@pytest.fixture
def ids() -> torch.Tensor:
    """[2, 6], the second text two tokens shorter; the pad is 0."""
    return questions()["input_ids"]


def mask_of(release: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    own: torch.Tensor = release.inputs(input_ids=ids, **options)["attention_mask"][:, -ids.shape[1] :]
    return own


def test_pads_are_left_out_as_in_the_unprotected_model(ids: torch.Tensor, exact: dpx.DPXAttnConfig) -> None:
    model, prefix = tiny("llama"), tokens(PREFIX)
    plain = torch.cat([prefix.expand(2, -1), ids], 1)
    want = generate(model, {"input_ids": plain})  # no mask: inferred
    release = dpx.protect(model, exact).release(prefix, prefix_bucket=PREFIX)
    got = generate(model, release.inputs(input_ids=ids))
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(mask_of(release, ids), questions()["attention_mask"])


def test_no_mask_is_inferred_where_transformers_infers_none(
    ids: torch.Tensor, exact: dpx.DPXAttnConfig
) -> None:
    model = tiny("llama")
    release = dpx.protect(model, exact).release(tokens(PREFIX))
    settings = model.generation_config
    for pad, end in ((None, 2), (0, 0), (0, [2, 0]), (5, 2)):
        settings.pad_token_id, settings.eos_token_id = pad, end
        hidden = ids != 5 if pad == 5 else torch.ones_like(ids).bool()
        assert torch.equal(mask_of(release, ids).bool(), hidden), (pad, end)
    settings.pad_token_id, settings.eos_token_id = 0, None
    assert int(mask_of(release, ids).sum()) == 10
    given = torch.ones_like(ids)
    assert torch.equal(mask_of(release, ids, attention_mask=given), given)  # a mask that is given stands


def test_tokens_that_are_passed_on_count_first(ids: torch.Tensor, exact: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    release = dpx.protect(model, exact).release(tokens(PREFIX))
    model.generation_config.pad_token_id = None
    assert bool(mask_of(release, ids).all())
    assert int(mask_of(release, ids, pad_token_id=0).sum()) == 10
    assert int(mask_of(release, ids, generation_config=GenerationConfig(pad_token_id=0)).sum()) == 10
    assert bool(mask_of(release, ids, pad_token_id=0, eos_token_id=[0]).all())
    inputs = release.inputs(input_ids=ids, pad_token_id=0)
    assert inputs["pad_token_id"] == 0
    model.generate(**inputs, max_new_tokens=2)
