"""The linear posterior that a training starts at: it needs no training, and nothing does better among linear sums of its scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors
from hf_dp_xattn.calibration.anchors.linear_start import fit_linear_start, water_filled
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings
from hf_dp_xattn.config import DPXAttnConfig

from .synthetic_contexts import CHANNELS, TOPICS, contexts, objective, public_data

CONFIG = DPXAttnConfig(mechanism="anchors", unit="row")
UNTRAINED = SlotSettings(code=8, slots=4, hidden=32, directions=8, steps=0, batch=32, queries=16)


def left_over(squares: torch.Tensor, spread: torch.Tensor, noise: float) -> float:
    """Of a signal in noise, by the linear posterior."""
    return float((spread * noise / (spread * squares + noise)).sum())


@pytest.mark.parametrize("noise", [1e-3, 0.1, 10.0])
def test_water_filling_is_the_best_of_all_scales(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    spread, energy = (torch.rand(12, generator=generator) + 0.01 for _ in range(2))
    best = water_filled(spread, energy, noise)
    assert float((best * energy).sum()) == pytest.approx(1.0, abs=1e-4)
    found = left_over(best, spread, noise)
    for _ in range(200):
        other = best * torch.exp(torch.randn(12, generator=generator)) + 0.01 * torch.rand(
            12, generator=generator
        )
        assert left_over(other / (other * energy).sum(), spread, noise) >= found - 1e-5
    # what is loud and says little is left out where noise is large
    assert bool((best > 0).all()) == (noise < 0.01)


def test_scores_are_those_of_the_layers_values() -> None:
    public = contexts(300)
    start = fit_linear_start(public, objective(), 64)
    assert start is not None
    scores = start.scores(public)
    covariance = scores.mT @ scores / len(scores)
    assert torch.allclose(covariance, torch.diag(start.spread), atol=2e-3 * float(start.spread[0]))
    # three topics and nothing else: what is beyond is the mean of twelve rows' noise
    assert float(start.spread[:TOPICS].min()) > 20 * float(start.spread[TOPICS])
    means = public.units.float().mean(1)
    moved = (means - means.mean(0)) - scores @ start.back.mT
    assert float(moved.square().mean()) < 1e-3 * float((means - means.mean(0)).square().mean())


def test_it_needs_no_training() -> None:
    """Where a decoder that starts anywhere is no better than the public mean, this one tells nearly everything."""
    settings = AnchorSettings(releases=("sum",), slots=UNTRAINED, epsilons=(1.0, 8.0))
    calibration = fit_anchors(CONFIG, public_data(contexts(400)), settings)
    small, large = calibration.plans
    assert large.worth is not None and large.worth.useful and large.quality.fvu < 0.25
    assert small.quality.fvu < 1.0


def test_contexts_that_do_not_differ_have_no_directions() -> None:
    same = contexts(1).units.expand(80, -1, -1)
    public = PublicContexts(same, torch.ones(same.shape[:2], dtype=torch.bool), same)
    assert fit_linear_start(public, objective(), 8) is None


def test_units_that_are_missing_do_not_count() -> None:
    public = contexts(200)
    mask = torch.ones(public.mask.shape, dtype=torch.bool)
    mask[:, 6:] = False
    wild = public.units.clone()
    wild[:, 6:] = 100.0
    told = [
        fit_linear_start(dataclasses.replace(public, units=units, mask=mask), objective(), 8)
        for units in (public.units, wild)
    ]
    assert told[0] is not None and told[1] is not None
    assert torch.equal(told[0].forward, told[1].forward) and torch.equal(told[0].energy, told[1].energy)
    assert told[0].units == 6.0 and told[0].forward.shape[1] == CHANNELS
