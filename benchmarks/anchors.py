"""`anchors` at Stable Diffusion 1.5's shapes (random weights): calibration, release, activation, and the time of a denoising step.

Public contexts are synthetic embeddings [10000, 77, 768] with a topic in every row; what is timed does not depend on what they say.
Protected and unprotected steps alternate in one run. Targets: calibration of 4,096 anchors <= 10 minutes, release of a prompt <= 50 ms
(decoding included), protected / unprotected step <= 1.00, all on two cores.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from scipy.stats import binom
from sd15 import CHANNELS, ROWS, build, check, step
from tqdm.auto import tqdm

import hf_dp_xattn as dpx

TOPICS = 24


def contexts(count: int, seed: int = 0) -> torch.Tensor:
    """[count, 77, 768] float16: a few topics of each context, in proportion to the row, its position, and noise."""
    fixed = torch.Generator().manual_seed(1)
    directions = torch.randn(TOPICS, CHANNELS, generator=fixed)
    position = torch.randn(ROWS, CHANNELS, generator=fixed)
    gen = torch.Generator().manual_seed(seed)
    out = torch.empty(count, ROWS, CHANNELS, dtype=torch.float16)
    for start in range(0, count, 256):
        size = min(256, count - start)
        topics = torch.randn(size, TOPICS, generator=gen) @ directions * TOPICS**-0.5
        noise = torch.randn(size, ROWS, CHANNELS, generator=gen)
        out[start : start + size] = (position + topics.unsqueeze(1) + 0.5 * noise).half()
    return out


def pipeline() -> StableDiffusionPipeline:
    """SD 1.5's UNet behind a small VAE; no text encoder, so contexts are embeddings."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=32)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=build(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(count: int = 10_000, anchors: int = 4096) -> dict[str, object]:
    """Seconds of a calibration, and of releases with it."""
    warnings.simplefilter("ignore")
    pipe = pipeline()
    gen = torch.Generator().manual_seed(2)
    negative, private = torch.randn(2, 1, ROWS, CHANNELS, generator=gen)
    error = check(pipe.unet, negative, private)
    public = contexts(count)
    config = dpx.DPXAttnConfig(unit="row", mechanism="anchors")
    start = time.perf_counter()
    calibration = dpx.calibrate(pipe, public, config, epsilons=(4.0, 8.0), anchors=anchors, progress=False)
    calibration_s = time.perf_counter() - start
    del public
    gc.collect()
    fresh = contexts(24, seed=9).float()
    release_s, activation_s, rows = [], [], []
    # random rows, released to be timed: a ledger of their own
    with dpx.protect(
        pipe, config, calibration=calibration, ledger=dpx.Ledger(), allow_useless=True
    ) as protected:
        for context in fresh:  # different contexts: no cache
            start = time.perf_counter()
            release = protected.release(context)
            release_s.append(time.perf_counter() - start)
            start = time.perf_counter()
            release.inputs()
            activation_s.append(time.perf_counter() - start)
            served = release.contexts[0].context
            assert served is not None
            rows.append(served.rows.shape[0])
    return {
        "contexts": count,
        "anchors": anchors,
        "threads": torch.get_num_threads(),
        "relative_error_checked": error,
        "calibration_s": calibration_s,
        "releases": [p.release for p in calibration.plans],
        "release_s": sorted(release_s)[len(release_s) // 2],
        "activation_s": sorted(activation_s)[len(activation_s) // 2],
        "rows_served": max(rows),
    }


def measure_step(size: int = 64, repeats: int = 31) -> dict[str, object]:
    """One denoising step with guidance, protected and unprotected in turn; the calibration is small, the rows served are as many.

    A timed step is not a picture's first, which reads the placeholder (`activation_s`). Steps vary by some per cent on a shared machine,
    cross-attention is a fifteenth of them and all that differs: hence many pairs, each in the other order than the one before, and an
    interval for their median. The layers of cross-attention are also timed alone, in turn, on a step's own inputs.
    """
    warnings.simplefilter("ignore")
    pipe = pipeline()
    negative = torch.randn(1, ROWS, CHANNELS, generator=torch.Generator().manual_seed(2))
    config = dpx.DPXAttnConfig(unit="row", mechanism="anchors")
    calibration = dpx.calibrate(
        pipe,
        contexts(128),
        config,
        epsilons=(8.0,),
        releases=("sum",),
        steps=10,
        query_prompts=1,
        query_steps=1,
        progress=False,
    )
    private = contexts(1, seed=9).float()
    plain = torch.cat([negative, private])
    inputs = _inputs(pipe.unet, plain, size)
    taken: dict[str, list[float]] = {"protected": [], "plain": []}
    rows, layers = 0, {}

    def timed(name: str, states: torch.Tensor) -> None:
        step(pipe.unet, states, 8)  # reads the placeholder, where there is one
        _run_layers(inputs, states)
        start = time.perf_counter()
        step(pipe.unet, states, size)
        taken[name].append(time.perf_counter() - start)

    for i in tqdm(range(repeats), desc="pairs of steps"):
        if i % 2:
            timed("plain", plain)
        with dpx.protect(
            pipe, config, calibration=calibration, ledger=dpx.Ledger(), allow_useless=True
        ) as protected:
            release = protected.release(private[0])
            served = release.contexts[0].context
            assert served is not None
            rows = served.rows.shape[0]
            states = torch.cat([negative, release.inputs()["prompt_embeds"]])
            timed("protected", states)
            if i == repeats - 1:
                layers = _time_layers(pipe.unet, inputs, states, plain)
        if not i % 2:
            timed("plain", plain)
    ratios = sorted(p / q for p, q in zip(taken["protected"], taken["plain"], strict=True))
    low, high = binom.interval(0.95, repeats, 0.5)
    unprotected = sorted(taken["plain"])[repeats // 2]
    return {
        "rows_served": rows,
        "repeats": repeats,
        "step_protected_s": sorted(taken["protected"])[repeats // 2],
        "step_unprotected_s": unprotected,
        "step_ratio": ratios[repeats // 2],
        "step_ratio_interval": [ratios[int(low)], ratios[int(high)]],
        "step_ratios": ratios,
        **layers,
        "step_ratio_from_layers": 1
        + (layers["layers_protected_s"] + layers["gate_s"] - layers["layers_unprotected_s"]) / unprotected,
    }


def measure_step_kept(repeats: int = 21) -> dict[str, object]:
    """`measure_step` in a process whose allocator keeps freed memory (glibc's malloc told so; tcmalloc and jemalloc do by themselves). By
    default glibc gives it back and a step faults it in anew, three gigabytes of it, by an order of allocations that differs by chance."""
    code = f"import json, anchors; print(json.dumps(anchors.measure_step(repeats={repeats})))"
    kept = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, **kept},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    result: dict[str, object] = json.loads(found.stdout.splitlines()[-1])
    return result


Inputs = list[tuple[Attention, torch.Tensor]]


def _inputs(unet: UNet2DConditionModel, states: torch.Tensor, size: int) -> Inputs:
    """The hidden states that each cross-attention layer is given in a step."""
    inputs: Inputs = []

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, Attention)
        inputs.append((module, args[0]))

    cross = [m for n, m in unet.named_modules() if n.endswith(".attn2")]
    hooks = [m.register_forward_pre_hook(keep) for m in cross]
    step(unet, states, size)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def _run_layers(inputs: Inputs, states: torch.Tensor) -> None:
    for attn, hidden in inputs:
        attn.processor(attn, hidden, encoder_hidden_states=states)


@torch.no_grad()
def _time_layers(
    unet: UNet2DConditionModel, inputs: Inputs, states: torch.Tensor, plain: torch.Tensor, repeats: int = 15
) -> dict[str, float]:
    """Seconds in all cross-attention layers of a step, protected and plain in turn on the same inputs; and in the gate before the UNet."""
    seconds = {"layers_protected_s": 0.0, "layers_unprotected_s": 0.0}
    unprotected = AttnProcessor2_0()
    for attn, hidden in inputs:
        taken: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(repeats):
            for name, processor, given in (
                ("layers_protected_s", attn.processor, states),
                ("layers_unprotected_s", unprotected, plain),
            ):
                start = time.perf_counter()
                processor(attn, hidden, encoder_hidden_states=given)
                taken[name].append(time.perf_counter() - start)
        for name, values in taken.items():
            seconds[name] += sorted(values)[repeats // 2]
    start = time.perf_counter()
    for gate in list(unet._forward_pre_hooks.values()):
        gate(unet, (None, 0), {"encoder_hidden_states": states})
    return {**seconds, "gate_s": time.perf_counter() - start}
