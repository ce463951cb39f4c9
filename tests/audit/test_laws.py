"""Likelihoods of the audit: every coordinate in which candidates differ is read, drawn or projected."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_dp_xattn.audit import laws
from hf_dp_xattn.audit.laws import AdditiveViews
from hf_dp_xattn.privacy.accountant import GaussianEvent
from hf_dp_xattn.privacy.additive import GaussianNoise
from hf_dp_xattn.privacy.bits import SeededEntropy

TRIALS = 6000
TOLERANCE = math.sqrt(math.log(2e6) / (2 * TRIALS))  # Hoeffding: exceeded with probability at most 10^-6


def rate(coordinates: int) -> float:
    """How often the likelier of two candidates that differ by one step everywhere is the right one; sigma = 40 steps."""
    totals = torch.stack([torch.zeros(coordinates), torch.ones(coordinates)]).to(torch.int64)
    views = AdditiveViews(totals, GaussianNoise(1600), GaussianEvent(64, 1600))
    scores = views.scores(0, TRIALS, SeededEntropy(1))
    return float(np.mean(scores[:, 0] > scores[:, 1]))


@pytest.mark.parametrize("coordinates", [400, 3000], ids=lambda d: f"D={d}")
def test_all_coordinates_are_read(coordinates: int) -> None:
    expected = 0.5 * math.erfc(-math.sqrt(coordinates) / (2 * 40) / math.sqrt(2))
    assert rate(coordinates) == pytest.approx(expected, abs=TOLERANCE)


def test_an_attacker_who_reads_512_of_them_is_told_from_one_who_reads_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(laws, "_projected", lambda differences, variance, draws: 0.0)
    expected = 0.5 * math.erfc(-math.sqrt(3000) / (2 * 40) / math.sqrt(2))
    assert abs(rate(3000) - expected) > TOLERANCE
