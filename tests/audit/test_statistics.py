"""Bounds on probabilities and on epsilon, against scipy's own and against laws that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_dp_xattn.audit.statistics import ceiling, epsilon_bound, gaussian_epsilon, lower_bound, upper_bound

ERROR = 1e-6


@given(trials=st.integers(1, 5000), share=st.floats(0, 1), error=st.floats(1e-9, 0.4))
@settings(max_examples=60, deadline=None)
def test_binomial_bounds_are_clopper_and_pearson(trials: int, share: float, error: float) -> None:
    hits = round(share * trials)
    exact = stats.binomtest(hits, trials).proportion_ci(1 - 2 * error, method="exact")
    assert lower_bound(hits, trials, error) == pytest.approx(exact.low, rel=1e-5, abs=1e-300)
    assert upper_bound(hits, trials, error) == pytest.approx(exact.high, rel=1e-5)


@pytest.mark.parametrize("hits", [0, 1, 7, 39, 40], ids=lambda h: f"{h} of 40")
def test_a_bound_is_wrong_no_more_often_than_it_says(hits: int) -> None:
    """At the bound itself, so many hits or more (fewer) have exactly the stated probability."""
    low, high = float(lower_bound(hits, 40, 0.01)), float(upper_bound(hits, 40, 0.01))
    assert hits == 0 or stats.binom.sf(hits - 1, 40, low) == pytest.approx(0.01)
    assert hits == 40 or stats.binom.cdf(hits, 40, high) == pytest.approx(0.01)
    assert (hits > 0 or low == 0.0) and (hits < 40 or high == 1.0)


@given(mu=st.floats(0.05, 12), delta=st.floats(1e-12, 0.3))
@settings(max_examples=80, deadline=None)
def test_epsilon_of_a_gaussian_pair(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    below, above = epsilon * (1 - 1e-6) - 1e-9, epsilon * (1 + 1e-6) + 1e-9
    assert _hockey_stick(mu, above) <= delta * (1 + 1e-9)
    assert epsilon == 0.0 or _hockey_stick(mu, below) >= delta * (1 - 1e-9)


def _hockey_stick(mu: float, epsilon: float) -> float:
    """By integration over the likelihood ratio's level set: P(y > t) - e^eps Q(y > t), t where the ratio is e^eps."""
    t = epsilon / mu + mu / 2
    return float(stats.norm.sf(t, loc=mu) - math.exp(epsilon + stats.norm.logsf(t)))


def test_a_pair_that_cannot_be_told_apart_shows_nothing() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == 0.0 and gaussian_epsilon(1.0, 0.0) == math.inf
    same = np.zeros(1000)
    assert epsilon_bound(same, same, 0.0, ERROR, gaussian=False) == 0.0
    assert epsilon_bound(same, same, 1e-5, ERROR, gaussian=True) == 0.0


def two_answers(epsilon: float, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood ratios of binary randomised response, the worst of all epsilon-DP releases."""
    rng, truth = np.random.default_rng(seed), math.exp(epsilon) / (1 + math.exp(epsilon))
    return tuple(epsilon * np.where(rng.random(draws) < p, 1.0, -1.0) for p in (truth, 1 - truth))  # type: ignore[return-value]


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0], ids=lambda e: f"eps={e:g}")
def test_randomised_response_is_seen_and_not_more(epsilon: float) -> None:
    found = [
        epsilon_bound(*two_answers(epsilon, 40_000, seed), 0.0, ERROR, gaussian=False) for seed in range(20)
    ]
    assert max(found) <= epsilon  # wrong with probability at most 20 x 10^-6; seeded
    assert np.median(found) > 0.75 * epsilon - 0.05


def test_the_bound_at_95_percent_is_wrong_about_so_often() -> None:
    """It has power to be wrong: at error 0.5, many of 200 bounds lie above the truth, at 0.05 few."""
    draws = [two_answers(1.0, 2_000, seed) for seed in range(200)]
    wrong = {
        error: sum(epsilon_bound(*pair, 0.0, error, gaussian=False) > 1.0 for pair in draws)
        for error in (0.9, 0.05)
    }
    assert wrong[0.05] <= 25 and wrong[0.9] > wrong[0.05]


@pytest.mark.parametrize("mu", [0.3, 1.7, 4.0], ids=lambda m: f"mu={m:g}")
def test_gaussian_noise_is_seen_and_not_more(mu: float) -> None:
    true = gaussian_epsilon(mu, 1e-5)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(mu, 1, 20_000), rng.normal(0, 1, 20_000)
        found = epsilon_bound(x, y, 1e-5, ERROR, gaussian=True)
        assert 0.3 * true < found <= true  # at most 10 x 10^-6; seeded
        assert epsilon_bound(-y, -x, 1e-5, ERROR, gaussian=True) <= true  # the other way round


def test_without_the_family_the_same_draws_show_less() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(2.0, 1, 20_000), rng.normal(0, 1, 20_000)
    assert epsilon_bound(x, y, 1e-5, ERROR, gaussian=False) < epsilon_bound(x, y, 1e-5, ERROR, gaussian=True)


@pytest.mark.parametrize("gaussian", [False, True])
def test_the_ceiling_is_reached_by_two_that_never_overlap(gaussian: bool) -> None:
    x, y = np.ones(4000), np.zeros(4000)
    assert epsilon_bound(x, y, 1e-5, ERROR, gaussian=gaussian) == pytest.approx(
        ceiling(4000, 1e-5, ERROR, gaussian=gaussian)
    )
