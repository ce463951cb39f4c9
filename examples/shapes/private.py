"""The shapes pipeline with private prompts: the config, the public calibration, and pictures at one epsilon."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from diffusers import StableDiffusionPipeline

import hf_dp_xattn as dpx
from shapes.evaluate import generate
from shapes.scenes import train_examples

DELTA = 1e-5
PUBLIC_CAPTIONS = 900
PUBLIC_SEED = 1
RANK = 320


def config(epsilon: float, **changes: object) -> dpx.DPXAttnConfig:
    """kernel_sum with the settings that the shapes pipeline likes; epsilon = inf gives exact attention (not private)."""
    base = dpx.DPXAttnConfig(mechanism="kernel_sum", delta=DELTA, degree=2, projection_dim=6, logit_bound=1.0)
    if np.isinf(epsilon):
        return base.replace(mechanism="none", **changes)
    return base.replace(epsilon=float(epsilon), **changes)


def calibrate(
    pipeline: StableDiffusionPipeline,
    epsilons: Sequence[float],
    *,
    captions: int = PUBLIC_CAPTIONS,
    rank: int = RANK,
    unit: str = "row",
    progress: bool = True,
) -> dpx.Calibration:
    """Calibration on training captions: public, and disjoint from the held-out ones in every (colour, shape, place)."""
    public = [e.caption for e in train_examples(captions, PUBLIC_SEED)]
    finite = [float(e) for e in epsilons if np.isfinite(e)]
    return dpx.calibrate(
        pipeline, public, config(8.0, unit=unit), epsilons=finite, rank=rank, progress=progress
    )


def generate_private(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    epsilon: float,
    calibration: dpx.Calibration,
    *,
    seed: int = 0,
    unit: str = "row",
    ledger: dpx.Ledger | None = None,
    budget: dpx.Budget | None = None,
) -> tuple[np.ndarray, dpx.PrivacyReport]:
    """Pictures [n, 32, 32, 3] of private captions, one release and budget each, and the report. Restores the pipeline."""
    settings = config(epsilon, unit=unit)
    public = calibration if settings.is_private else None
    with dpx.protect(pipeline, settings, calibration=public, ledger=ledger, budget=budget) as protected:
        images = generate(pipeline, captions, seed=seed)
        return images, protected.report()
