"""Calls that change nothing leave a protected pipeline as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from diffusers.models.attention_processor import AttnProcessor

import hf_dp_xattn as dpx

from ...hosts_tiny import close, picture

PROMPT = "a red circle"
CALLS: dict[str, Callable[[Any], Any]] = {
    "set_default_attn_processor": lambda p: p.unet.set_default_attn_processor(),
    "enable_attention_slicing": lambda p: p.enable_attention_slicing(),
    "disable_attention_slicing": lambda p: p.disable_attention_slicing(),
    "disable_xformers": lambda p: p.disable_xformers_memory_efficient_attention(),
    "unload_ip_adapter": lambda p: p.unload_ip_adapter(),
    "unload_lora_weights": lambda p: p.unload_lora_weights(),
    "unfuse_lora": lambda p: p.unet.unfuse_lora(),
    "disable_freeu": lambda p: p.disable_freeu(),
    "the same processors": lambda p: p.unet.set_attn_processor(p.unet.attn_processors),
    "disable_gradient_checkpointing": lambda p: p.unet.disable_gradient_checkpointing(),
    "disable_vae_slicing": lambda p: p.vae.disable_slicing(),
    "remove_all_hooks": lambda p: p.remove_all_hooks(),
    "reset_device_map": lambda p: p.reset_device_map(),
    "maybe_free_model_hooks": lambda p: p.maybe_free_model_hooks(),
    "to the same device": lambda p: p.to("cpu"),
}


@pytest.mark.parametrize("name", CALLS)
def test_harmless_calls_are_harmless(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    before, charged = picture(pipe, PROMPT), handle.ledger.entries()
    assert {c.number_of_releases for c in charged} == {1}  # the text as itself, and its token ids
    assert len({c.digest for c in charged}) == len(charged) > 1
    CALLS[name](pipe)
    handle.guard.check_thoroughly()
    assert close(before, picture(pipe, PROMPT)) and handle.ledger.entries() == charged
    dpx.unprotect(pipe)
    CALLS[name](pipe)
    picture(pipe, PROMPT)


def test_the_default_is_set_where_nothing_is_protected(pipe: Any, private: Any) -> None:
    dpx.protect(pipe, private)
    pipe.unet.set_default_attn_processor()
    kinds = {n.split(".")[-2]: type(p) for n, p in pipe.unet.attn_processors.items()}
    assert kinds == {"attn1": AttnProcessor, "attn2": dpx.DPAttnProcessor}


def test_what_changes_something_still_goes_through(pipe: Any, private: Any) -> None:
    """And is noticed: `test_fail_closed.py` has more of them."""
    dpx.protect(pipe, private)
    pipe.fuse_qkv_projections()
    with pytest.raises(dpx.ProtectionLostError):
        picture(pipe, PROMPT)


def test_a_release_that_no_longer_fits_is_not_advised(pipe: Any, private: Any) -> None:
    """Its weights changed since; only the old ones, or a larger budget, help."""
    handle = dpx.protect(pipe, private)
    release = handle.release(PROMPT)
    layer = next(iter(handle.layers.values())).module
    weight = layer.to_k.weight.detach().clone()
    layer.to_k.weight.data.add_(0.3)
    for call in (lambda: picture(pipe, PROMPT), lambda: handle.release(PROMPT)):
        with pytest.raises(dpx.BudgetExceededError) as caught:
            call()
        told = str(caught.value)
        assert "Use the release that exists" not in told and "Restore the weights" in told
    layer.to_k.weight.data.copy_(weight)
    assert handle.release(PROMPT).contexts == release.contexts
    with pytest.raises(dpx.BudgetExceededError, match="Use the release that exists"):
        handle.release(PROMPT, fresh=True)
