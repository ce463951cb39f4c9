"""What is allowed before `protect` is allowed after it, with the same picture; or refused at both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
from diffusers.models.attention_processor import AttnProcessor2_0, SlicedAttnProcessor

import hf_dp_xattn as dpx

from ..hosts_tiny import close, latents, picture, tiny_sd, tiny_sdxl
from .test_devices import offload
from .test_fail_closed import load_ip_adapter
from .test_lora import add_lora
from .text.libraries import answer_with, config, library
from .text.pipelines import call, tiny_pixart

PROMPT = "a red circle"
CHANGES: dict[str, Callable[[Any], Any]] = {
    "attention slicing": lambda p: p.enable_attention_slicing(1),
    "slicing of self-attention": lambda p: p.unet.set_attention_slice("max"),
    "VAE slicing": lambda p: p.vae.enable_slicing(),
    "model offload": lambda p: offload(p, "model"),
    "sequential offload": lambda p: offload(p, "sequential"),
    "LoRA": lambda p: add_lora(_denoiser(p)),
    "LoRA of the text encoder": lambda p: add_lora(p.text_encoder, targets=("q_proj", "v_proj")),
    "compile": lambda p: _denoiser(p).compile(backend="eager"),
    "half precision": lambda p: p.to(torch.bfloat16),
    "FreeU": lambda p: p.enable_freeu(0.9, 0.2, 1.1, 1.2),
    "channels last": lambda p: _denoiser(p).to(memory_format=torch.channels_last),
    "freed hooks": lambda p: p.maybe_free_model_hooks(),
    "another scheduler": lambda p: p.register_modules(scheduler=DPMSolverMultistepScheduler()),
    "fused projections": lambda p: _denoiser(p).fuse_qkv_projections(),
    "fused and undone": lambda p: (
        _denoiser(p).fuse_qkv_projections(),
        _denoiser(p).unfuse_qkv_projections(),
    ),
    "IP-Adapter": load_ip_adapter,
    "another processor": lambda p: _denoiser(p).set_attn_processor(_Own()),
}
HOSTS: dict[str, tuple[Callable[[], Any], str]] = {
    "sd": (tiny_sd, "none"),
    "sd, library": (tiny_sd, "library"),
    "pixart": (tiny_pixart, "none"),
    "sdxl": (
        tiny_sdxl,
        "none",
    ),  # whose pooled vector is that of a public text: only what is refused is tried
    "sdxl, library": (tiny_sdxl, "library"),
}
REFUSED = {
    "sd": {"fused projections", "IP-Adapter", "another processor"},
    "sd, library": {"LoRA of the text encoder"},  # whose codes are not those of the library then
    "pixart": {"compile"},
    "sdxl": {"attention slicing", "compile", "IP-Adapter"},
    "sdxl, library": {"LoRA of the text encoder"},
}
NO_SUCH = {
    "sd, library": {"IP-Adapter"},  # which wants a picture, and reads no private text
    "pixart": {"slicing of self-attention", "FreeU", "LoRA", "LoRA of the text encoder", "IP-Adapter"},
    "sdxl": set(CHANGES) - REFUSED["sdxl"],
    "sdxl, library": {"IP-Adapter"},
}
SLOW = {"compile", "LoRA of the text encoder", "channels last", "FreeU"}
CASES = [
    pytest.param(host, name, marks=[pytest.mark.slow] * (name in SLOW))
    for host in HOSTS
    for name in CHANGES
    if name not in NO_SUCH.get(host, ())
]


class _Own(AttnProcessor2_0):
    """A user's own."""


def _denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _protect(pipe: Any, mechanism: str, made: Any = None) -> Any:
    """made: the library."""
    if mechanism == "library":
        handle = dpx.protect(pipe, config(), calibration=made, ledger=dpx.Ledger())
        answer_with(handle, "a red circle")
        return handle
    return dpx.protect(pipe, dpx.DPXAttnConfig(unit="row", mechanism=mechanism))


def _draw(pipe: Any) -> torch.Tensor:
    if isinstance(pipe, PixArtAlphaPipeline):
        return call(pipe, PROMPT, negative_prompt="ugly").float()
    return picture(pipe, PROMPT, negative_prompt="ugly", latents=latents(1, pipe.unet.dtype)).float()


def _changed_and_protected(host: str, name: str, first: str) -> tuple[Any, Any]:
    """The pipeline and its handle."""
    make, mechanism = HOSTS[host]
    pipe = make()
    made = library(pipe) if mechanism == "library" else None
    if first == "change":
        CHANGES[name](pipe)
    handle = _protect(pipe, mechanism, made)
    if first == "protect":
        CHANGES[name](pipe)
    return pipe, handle


@pytest.mark.parametrize(("host", "name"), CASES)
def test_allowed_at_both_or_refused_at_both(host: str, name: str) -> None:
    torch._dynamo.reset()
    if name in REFUSED.get(host, ()):
        for first in ("change", "protect"):
            with pytest.raises(dpx.DPXAttnError):
                _draw(_changed_and_protected(host, name, first)[0])
        return
    plain = HOSTS[host][0]()
    CHANGES[name](plain)
    want = _draw(plain)
    tolerance = 1e-3 * float(want.abs().max())
    if name == "half precision":  # that of the unprotected pipeline
        tolerance = max(tolerance, float((want - _draw(HOSTS[host][0]())).abs().max()))
    for first in ("change", "protect"):
        pipe, handle = _changed_and_protected(host, name, first)
        found = _draw(pipe)
        assert float((found - want).abs().max()) <= tolerance
        handle.check()
        dpx.unprotect(pipe)
        assert close(_draw(pipe), want)


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
