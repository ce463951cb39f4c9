"""What is allowed before `protect` is allowed after it, with the same picture; or refused at both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

import hf_dp_xattn as dpx

from ..hosts_tiny import close, latents, picture, tiny_sd
from .test_devices import offload
from .test_fail_closed import load_ip_adapter
from .test_lora import add_lora
from .text.libraries import answer_with, config, library

PROMPT = "a red circle"
ALLOWED: dict[str, Callable[[Any], Any]] = {
    "attention slicing": lambda p: p.enable_attention_slicing(1),
    "slicing of self-attention": lambda p: p.unet.set_attention_slice("max"),
    "VAE slicing": lambda p: p.vae.enable_slicing(),
    "model offload": lambda p: offload(p, "model"),
    "sequential offload": lambda p: offload(p, "sequential"),
    "LoRA": lambda p: add_lora(p.unet),
    "LoRA of the text encoder": lambda p: _lora_of_text(p),
    "compile": lambda p: p.unet.compile(backend="eager"),
    "half precision": lambda p: p.to(torch.bfloat16),
    "FreeU": lambda p: p.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "channels last": lambda p: p.unet.to(memory_format=torch.channels_last),
    "freed hooks": lambda p: p.maybe_free_model_hooks(),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "fused projections": lambda p: p.fuse_qkv_projections(),
    "IP-Adapter": load_ip_adapter,
    "another processor": lambda p: p.unet.set_attn_processor(_Own()),
}
MECHANISMS = ("none", "library")
SLOW = {"compile", "LoRA of the text encoder", "channels last", "FreeU"}


class _Own(AttnProcessor2_0):
    """A user's own."""


def _lora_of_text(pipe: Any) -> None:
    add_lora(pipe.text_encoder, targets=("q_proj", "v_proj"))


def _protect(pipe: Any, mechanism: str) -> Any:
    if mechanism == "library":
        handle = dpx.protect(pipe, config(), calibration=library(pipe), ledger=dpx.Ledger())
        answer_with(handle, "a red circle")
        return handle
    return dpx.protect(pipe, dpx.DPXAttnConfig(unit="row", mechanism=mechanism))


def _draw(pipe: Any) -> torch.Tensor:
    return picture(pipe, PROMPT, negative_prompt="ugly", latents=latents(1, pipe.unet.dtype)).float()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in ALLOWED])
def test_allowed_at_both(name: str, mechanism: str) -> None:
    change, plain = ALLOWED[name], tiny_sd()
    torch._dynamo.reset()
    change(plain)
    want, pictures = _draw(plain), []
    for first in ("change", "protect"):
        pipe = tiny_sd()
        if first == "change":
            change(pipe)
        handle = _protect(pipe, mechanism)
        if first == "protect":
            change(pipe)
        pictures.append(_draw(pipe))
        handle.check()
        dpx.unprotect(pipe)
        assert close(_draw(pipe), want)
    tolerance = 0.05 if name == "half precision" else 1e-3
    for found in pictures:
        assert float((found - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_both(name: str) -> None:
    pipe = tiny_sd()
    REFUSED[name](pipe)
    with pytest.raises(dpx.UnsupportedModelError):
        _protect(pipe, "none")
    pipe = tiny_sd()
    _protect(pipe, "none")
    REFUSED[name](pipe)
    with pytest.raises(dpx.ProtectionLostError):
        _draw(pipe)


def test_slicing_waits_for_unprotect() -> None:
    """The processors of self-attention change at once, those of protected layers when the host has its own again."""
    pipe, plain = tiny_sd(), tiny_sd()
    plain.enable_attention_slicing(1)
    want = {n: type(p) for n, p in plain.unet.attn_processors.items()}
    assert set(want.values()) == {SlicedAttnProcessor}
    _protect(pipe, "none")
    pipe.enable_attention_slicing(1)
    now = {n.split(".")[-2]: type(p) for n, p in pipe.unet.attn_processors.items()}
    assert now == {"attn1": SlicedAttnProcessor, "attn2": dpx.DPAttnProcessor}
    dpx.unprotect(pipe)
    assert {n: type(p) for n, p in pipe.unet.attn_processors.items()} == want
    _protect(pipe, "none")
    pipe.disable_attention_slicing()
    dpx.unprotect(pipe)
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
