"""The shapes pipeline with private prompts: configs, the shipped public calibrations, and pictures at one epsilon."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import StableDiffusionPipeline

import hf_dp_xattn as dpx
from shapes.evaluate import generate
from shapes.scenes import Example, phrases, train_examples

DELTA = 1e-5
UNITS = ("row", "group", "context")
PUBLIC_SEED = 1
CALIBRATIONS = Path(__file__).parent / "calibrations"
KERNEL_SUM_CAPTIONS = 900
KERNEL_SUM_RANK = 320
# what suits the paper's trees best on PUBLIC captions: one direction a head and one bin, hardly more than the mean value
TREE_SETTINGS: dict[str, Any] = {"degree": 1, "projection_dim": 1, "logit_bound": 0.1, "tree_bins": 1}
TREE_CAPTIONS = 400


def config(
    epsilon: float, *, unit: str = "row", mechanism: str = "anchors", **changes: object
) -> dpx.DPXAttnConfig:
    """The settings that the shapes pipeline likes; epsilon = inf gives exact attention (not private)."""
    base = dpx.DPXAttnConfig(
        mechanism=mechanism, delta=DELTA, unit=unit, degree=2, projection_dim=6, logit_bound=1.0
    )
    if np.isinf(epsilon):
        return base.replace(mechanism="none", **changes)
    return base.replace(epsilon=float(epsilon), **changes)


def load_calibration(unit: str = "row") -> Any:
    """The shipped calibration for a unit; `python examples/shapes/calibrate.py` makes it."""
    return dpx.Calibration.from_pretrained(CALIBRATIONS / unit)


def prompts(examples: Sequence[Example], unit: str, seed: int = 0) -> list[str]:
    """The captions; for unit = group the same scenes phrase by phrase, joined by commas (where `protect` splits them again)."""
    if unit != "group":
        return [e.caption for e in examples]
    rng = np.random.default_rng(seed)
    return [", ".join(phrases(e.scene, rng)) for e in examples]


def calibrate_kernel_sum(
    pipeline: StableDiffusionPipeline,
    epsilons: Sequence[float],
    *,
    captions: int = KERNEL_SUM_CAPTIONS,
    rank: int = KERNEL_SUM_RANK,
    unit: str = "row",
    progress: bool = True,
) -> Any:
    """kernel_sum's calibration on training captions: public, and disjoint from the held-out ones in every (colour, shape, place)."""
    public = [e.caption for e in train_examples(captions, PUBLIC_SEED)]
    finite = [float(e) for e in epsilons if np.isfinite(e)]
    settings = config(8.0, unit=unit, mechanism="kernel_sum")
    return dpx.calibrate(pipeline, public, settings, epsilons=finite, rank=rank, progress=progress)


def calibrate_dptree(pipeline: StableDiffusionPipeline, *, captions: int = TREE_CAPTIONS) -> Any:
    """The public geometry (centres, directions, clipping bounds) that dptree uses with TREE_SETTINGS."""
    public = [e.caption for e in train_examples(captions, PUBLIC_SEED)]
    settings = {k: v for k, v in TREE_SETTINGS.items() if k != "tree_bins"}
    fitted = dpx.calibrate(
        pipeline,
        public,
        config(8.0, mechanism="kernel_sum", **settings),
        epsilons=(8.0,),
        rank=8,
        progress=False,
    )
    return dataclasses.replace(fitted, basis=None, plans=())


def generate_private(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    settings: dpx.DPXAttnConfig,
    calibration: Any = None,
    *,
    seed: int = 0,
    ledger: dpx.Ledger,
) -> tuple[np.ndarray, dpx.PrivacyReport]:
    """Pictures [n, 32, 32, 3] of private captions, one release and budget each, and the report. Restores the pipeline.

    ledger: a study, whose captions are public and drawn again and again, has a new one in memory for each call.
    """
    public = calibration if settings.is_private else None
    with dpx.protect(
        pipeline,
        settings,
        calibration=public,
        ledger=ledger,
        allow_useless=True,  # a study shows what is not worth it too
        allow_uncalibrated=True,
        allow_large_epsilon=True,
    ) as protected:
        images = generate(pipeline, captions, seed=seed)
        return images, protected.report()
