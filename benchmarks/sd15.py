"""Stable Diffusion 1.5's own UNet (its config, random weights): release time, structure memory, time of a denoising step.

16 cross-attention layers, 8 heads of 40/80/160 dims, n = 77, 64 x 64 latents, guidance (batch 2). Protected and unprotected
steps alternate in one run. Correctness first: with `mechanism="none"` a protected step must equal the unprotected one.
"""

from __future__ import annotations

import gc
import time
import warnings

import torch
from diffusers import UNet2DConditionModel

import hf_dp_xattn as dpx

SD15 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
ROWS, CHANNELS = 77, 768


def build() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**SD15).eval().requires_grad_(False)


@torch.no_grad()
def step(unet: UNet2DConditionModel, states: torch.Tensor, size: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    sample = torch.randn(1, 4, size, size, generator=gen).expand(2, -1, -1, -1)
    return unet(sample, 500, encoder_hidden_states=states).sample


def check(unet: UNet2DConditionModel, negative: torch.Tensor, private: torch.Tensor) -> float:
    """Largest relative difference of a protected `none` step and an unprotected one, at 16 x 16 latents."""
    plain = step(unet, torch.cat([negative, private]), 16)
    with dpx.protect(unet, dpx.DPXAttnConfig(unit="row", mechanism="none")) as protected:
        inputs = protected.release(private[0]).inputs()["encoder_hidden_states"]
        error = float((step(unet, torch.cat([negative, inputs]), 16) - plain).abs().max() / plain.abs().max())
    if not error < 1e-4:
        raise SystemExit(f"a protected step is wrong (relative error {error:.3g}): no times are printed.")
    return error


def measure(size: int = 64, repeats: int = 3) -> dict[str, object]:
    """Seconds and ratios; `size` is the latents' edge."""
    warnings.simplefilter("ignore")
    unet = build()
    gen = torch.Generator().manual_seed(2)
    negative, private = torch.randn(2, 1, ROWS, CHANNELS, generator=gen)
    error = check(unet, negative, private)
    start = time.perf_counter()
    protected = dpx.protect(
        unet,
        dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row"),
        ledger=dpx.Ledger(),
        allow_uncalibrated=True,
    )
    protect_s = time.perf_counter() - start
    release_times = []
    for i in range(3):  # three different contexts: no cache
        context = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(10 + i))
        start = time.perf_counter()
        release = protected.release(context)
        release_times.append(time.perf_counter() - start)
    memory = sum(
        t.numel() * t.element_size() for s in release.contexts[0].structures for t in (s.sums, s.floor)
    )
    states = torch.cat([negative, release.inputs()["encoder_hidden_states"]])
    plain_states = torch.cat([negative, private])
    protected_s, plain_s = [], []
    step(unet, states, size)
    for _ in range(repeats):
        start = time.perf_counter()
        step(unet, states, size)
        protected_s.append(time.perf_counter() - start)
        protected.unprotect()
        start = time.perf_counter()
        step(unet, plain_states, size)
        plain_s.append(time.perf_counter() - start)
        # protecting again forgets the bindings: release once more (not timed; random rows, so each time has a ledger of its own)
        protected = dpx.protect(
            unet,
            dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row"),
            ledger=dpx.Ledger(),
            allow_uncalibrated=True,
        )
        states = torch.cat([negative, protected.release(private[0]).inputs()["encoder_hidden_states"]])
    layers = len(protected.layers)
    protected.unprotect()
    del unet
    gc.collect()
    ratios = sorted(p / q for p, q in zip(protected_s, plain_s, strict=True))
    return {
        "layers": layers,
        "rows": ROWS,
        "latents": size,
        "threads": torch.get_num_threads(),
        "relative_error_checked": error,
        "protect_s": protect_s,
        "release_s": min(release_times),
        "structure_bytes": memory,
        "step_protected_s": min(protected_s),
        "step_unprotected_s": min(plain_s),
        "step_ratio": ratios[len(ratios) // 2],
        "step_ratios": ratios,
    }
