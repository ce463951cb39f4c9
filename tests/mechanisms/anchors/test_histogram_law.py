"""Histograms: the law of what is released, what is charged, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms.anchors.histogram import PreparedHistogram, prepare_gaussian, prepare_geometric
from hf_dp_xattn.privacy import additive
from hf_dp_xattn.privacy.accountant import PureEvent, epsilon_of
from hf_dp_xattn.privacy.additive import GaussianNoise, GeometricNoise
from hf_dp_xattn.privacy.noise import SeededEntropy

from ...privacy.laws import ALPHA, Law, accepted, chi_square
from .noised import release

RELATIONS = ["replace_one", "add_or_remove_one"]


def asymmetric_law(plus: float, minus: float) -> tuple[int, np.ndarray]:
    """(reach, pmf on [-reach, reach]) of P(z) ~ exp(-plus z), exp(-minus |z|)."""
    reach = math.ceil(40 / min(plus, minus))
    z = np.arange(-reach, reach + 1)
    weights = np.exp(np.where(z >= 0, -plus * z, minus * z))
    a, b = math.exp(-plus), math.exp(-minus)
    assert math.isclose(1 / weights.sum(), (1 - a) * (1 - b) / (1 - a * b), rel_tol=1e-9)
    return reach, weights / weights.sum()


def law_p_value(z: np.ndarray, plus: float, minus: float) -> float:
    reach, pmf = asymmetric_law(plus, minus)
    assert np.abs(z).max() <= reach
    return chi_square(np.bincount(z + reach, minlength=2 * reach + 1), pmf)


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_geometric_noise_has_its_law(epsilon: float, share: float) -> None:
    """The noise of a release of m cells. False alarms: 6 tests at ALPHA = 1e-8 each, below 1e-6 together."""
    m = 300_000
    p = prepare_geometric(epsilon, cells=m, unit="row", neighboring="replace_one", share_plus=share)
    cells = torch.arange(1000) % 37
    released = release(p, cells, entropy=SeededEntropy(round(epsilon)))
    z = (released - torch.bincount(cells, minlength=m)).numpy()
    assert law_p_value(z, epsilon * share, epsilon * (1 - share)) >= ALPHA
    if epsilon <= 4:
        # Power: rates swapped or 3 % off, or one sample in 20 set to zero, are rejected at the same level.
        if share != 0.5:
            assert law_p_value(z, epsilon * (1 - share), epsilon * share) < ALPHA
        assert law_p_value(z, epsilon * share * 1.03, epsilon * (1 - share) * 1.03) < ALPHA
        assert (
            law_p_value(np.where(np.arange(m) % 20 == 0, 0, z), epsilon * share, epsilon * (1 - share))
            < ALPHA
        )


@pytest.mark.parametrize("rate", [Fraction(1, 5), Fraction(9, 10)])
def test_large_rates_are_split_without_changing_the_law(
    rate: Fraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest of several geometric samples: with the sampler's limit lowered, so that the tail can be seen."""
    monkeypatch.setattr(additive, "_SAMPLER_RATE", Fraction(1, 4) if rate > 0.5 else Fraction(1, 16))
    z = GeometricNoise(rate, rate).sample(300_000, SeededEntropy(3)).numpy()
    assert law_p_value(z, float(rate), float(rate)) >= ALPHA
    assert law_p_value(z, float(rate) * 1.03, float(rate) * 1.03) < ALPHA


@pytest.mark.parametrize("unit", ["row", "group"])
def test_gaussian_noise_has_its_law(unit: str) -> None:
    m = 200_000
    p = prepare_gaussian(3.0, 1e-5, cells=m, unit=unit, neighboring="replace_one")
    cells = torch.arange(1000) % 37
    groups = torch.arange(1000) // 10 if unit == "group" else None
    z = (release(p, cells, groups=groups, entropy=SeededEntropy(5)) - p.exact_sums(cells, groups)).numpy()
    assert isinstance(p.noise, GaussianNoise)
    assert accepted(z, Law("gaussian", p.noise.sigma_squared))
    assert not accepted(z, Law("gaussian", p.noise.sigma_squared * Fraction(105, 100)))


@pytest.mark.parametrize(
    "prepared",
    [
        prepare_geometric(2.0, cells=5, unit="row", neighboring="replace_one", share_plus=0.7),
        prepare_gaussian(2.0, 1e-5, cells=5, unit="row", neighboring="replace_one"),
    ],
    ids=["geometric", "gaussian"],
)
def test_log_weight_is_the_law(prepared: PreparedHistogram) -> None:
    z = torch.tensor([-3, -1, 0, 1, 5]) << prepared.exponent
    noise = prepared.noise
    if isinstance(noise, GeometricNoise):
        expected = [-0.6 * 3, -0.6, 0.0, -1.4, -1.4 * 5]
    else:
        expected = [-(float(v) ** 2) / (2 * float(noise.sigma_squared)) for v in z]
    assert torch.allclose(noise.log_weight(z), torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_release_is_seeded_only_on_request() -> None:
    p = prepare_geometric(1.0, cells=500, unit="row", neighboring="replace_one")
    cells = torch.arange(77)
    assert torch.equal(
        release(p, cells, entropy=SeededEntropy(1)), release(p, cells, entropy=SeededEntropy(1))
    )
    assert not torch.equal(release(p, cells), release(p, cells))
    y = release(p, cells)
    assert y.dtype == torch.int64 and y.shape == (500,) and int(y.min()) < 0


# --- what is charged, and bad input ---------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 7.3, 16.0, 1000.0])
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize("unit", ["row", "group"])
def test_events_cost_epsilon(epsilon: float, relation: str, unit: str) -> None:
    p = prepare_geometric(epsilon, cells=9, unit=unit, neighboring=relation)
    assert p.events == (PureEvent(Fraction(epsilon)),) and epsilon_of(p.events, 0.0) <= epsilon
    noise = p.noise
    assert isinstance(noise, GeometricNoise)
    spent = (
        noise.rate_plus + noise.rate_minus
        if relation == "replace_one"
        else max(noise.rate_plus, noise.rate_minus)
    ) * p.bound
    assert spent <= Fraction(epsilon) and (spent == Fraction(epsilon) or epsilon == 1000.0)
    release(p, torch.zeros(3, dtype=torch.int64), groups=torch.arange(3) if unit == "group" else None)
    g = prepare_gaussian(epsilon, 1e-5, cells=9, unit=unit, neighboring=relation)
    assert epsilon * 0.999 <= epsilon_of(g.events, 1e-5) <= epsilon


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"epsilon": float("inf")}, "epsilon"),
        ({"epsilon": 1e-13}, "epsilon"),
        ({"unit": "word"}, "Unknown unit"),
        ({"neighboring": "swap"}, "Unknown unit .* or neighboring"),
        ({"cells": 0}, "cells"),
        ({"cells": 2.0}, "cells"),
        ({"unit": "group", "group_bound": 0}, "group_bound"),
        ({"unit": "group", "group_bound": float("nan")}, "group_bound"),
        ({"group_bound": 2}, "a row contributes one"),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(changes: dict[str, object], message: str) -> None:
    good = {"cells": 5, "unit": "row", "neighboring": "replace_one"}
    options = {**good, **{k: v for k, v in changes.items() if k != "epsilon"}}
    epsilon = changes.get("epsilon", 1.0)
    with pytest.raises(ConfigError, match=message):
        prepare_geometric(epsilon, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        prepare_gaussian(epsilon, 1e-5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_bad_shares_are_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share_plus"):
        prepare_geometric(1.0, cells=5, unit="row", neighboring="replace_one", share_plus=share)


def test_bad_cells_and_groups_are_refused() -> None:
    row = prepare_geometric(1.0, cells=5, unit="row", neighboring="replace_one")
    group = prepare_geometric(1.0, cells=5, unit="group", neighboring="replace_one")
    for bad in (torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(3, 1, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="int64"):
            release(row, bad)
    for value in (-1, 5):
        with pytest.raises(ContextError, match=r"\[0, 5\)"):
            release(row, torch.tensor([0, value]))
    cells = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ConfigError, match="groups"):
        release(row, cells, groups=cells)
    for groups in (None, torch.zeros(3), torch.zeros(2, dtype=torch.int64)):
        with pytest.raises(ConfigError, match="groups"):
            release(group, cells, groups=groups)
