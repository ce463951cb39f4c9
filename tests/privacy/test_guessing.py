"""guess_bound: an upper bound for every mechanism, attained by randomised response; by enumeration of all guessing rules."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.guessing import PRIORS, guess_bound
from hf_dp_xattn.privacy.response import RandomizedResponse

EPSILONS = (0.1, 1.0, 4.0)


def best_success(prior: np.ndarray, laws: np.ndarray) -> float:
    """laws [k, outputs]; tries every rule that names a symbol for each output."""
    k, outputs = laws.shape
    joint = prior[:, None] * laws
    return max(
        float(sum(joint[x, y] for y, x in enumerate(rule)))
        for rule in itertools.product(range(k), repeat=outputs)
    )


def response_laws(epsilon: float, k: int, delta: float = 0.0) -> np.ndarray:
    truth = delta + (1 - delta) * RandomizedResponse.of(epsilon, k).truth
    return np.where(np.eye(k) > 0, truth, (1 - truth) / (k - 1))


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_attained_by_randomised_response(epsilon: float, k: int) -> None:
    found = best_success(np.full(k, 1 / k), response_laws(epsilon, k))
    assert found == pytest.approx(guess_bound(epsilon, 0.0, 1 / k), rel=1e-3)
    assert found <= guess_bound(epsilon, 0.0, 1 / k) + 1e-12


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_with_delta_it_is_attained_up_to_delta_times_prior(epsilon: float) -> None:
    """Tell the truth with probability delta, else answer by randomised response: (epsilon, delta)-DP."""
    k, delta = 4, 0.05
    found = best_success(np.full(k, 1 / k), response_laws(epsilon, k, delta))
    bound = guess_bound(epsilon, delta, 1 / k)
    assert bound - delta / k - 1e-4 <= found <= bound + 1e-12


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("k", [2, 3, 5])
def test_add_or_remove_is_attained_too(epsilon: float, k: int) -> None:
    truth = guess_bound(epsilon, 0.0, 1 / k, "add_or_remove_one")
    laws = np.where(np.eye(k) > 0, truth, (1 - truth) / (k - 1))
    without = np.full(k, 1 / k)
    assert np.abs(np.log(laws / without)).max() <= epsilon + 1e-9  # it is DP against the absent unit
    assert best_success(np.full(k, 1 / k), laws) == pytest.approx(truth)


@given(st.integers(0, 10**6), st.floats(0.05, 3.0))
@settings(max_examples=60, deadline=None)
def test_never_exceeded(seed: int, epsilon: float) -> None:
    """Random laws and priors; their exact epsilon is computed, then every guessing rule is tried."""
    rng = np.random.default_rng(seed)
    k, outputs = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    laws = rng.dirichlet(np.ones(outputs), k) + 0.02
    laws = laws**epsilon
    laws /= laws.sum(1, keepdims=True)
    loss = max(float(np.log(a / b).max()) for a in laws for b in laws)
    prior = rng.dirichlet(np.ones(k))
    assert best_success(prior, laws) <= guess_bound(loss, 0.0, float(prior.max())) + 1e-12
    without = laws.mean(0)
    loss = float(np.abs(np.log(laws / without)).max())
    bound = guess_bound(loss, 0.0, float(prior.max()), "add_or_remove_one")
    assert best_success(prior, laws) <= bound + 1e-12


@given(st.floats(0, 800), st.floats(0, 1), st.floats(1e-9, 1))
def test_shape(epsilon: float, delta: float, prior: float) -> None:
    bound = guess_bound(epsilon, delta, prior)
    assert prior * (1 - 1e-12) <= bound <= 1
    forms = guess_bound(epsilon, delta, prior, "add_or_remove_one")
    assert bound <= forms + 1e-12  # the two hockey-stick forms hold as well, and say no more
    assert guess_bound(epsilon + 1, delta, prior) >= bound - 1e-12


def test_numbers() -> None:
    assert guess_bound(0.0, 0.0, 0.3) == pytest.approx(0.3)
    assert guess_bound(math.log(3), 0.0, 0.5) == pytest.approx(0.75)
    assert guess_bound(1.0, 0.0, 1e-6) == pytest.approx(math.e * 1e-6, rel=1e-5)
    assert guess_bound(math.inf, 0.0, 0.5) == 1.0
    assert len(PRIORS) == 3


@pytest.mark.parametrize("bad", [(-1.0, 0.0, 0.5), (math.nan, 0.0, 0.5), (1.0, 2.0, 0.5), (1.0, 0.0, 0.0)])
def test_bad_input(bad: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError):
        guess_bound(*bad)
    with pytest.raises(ConfigError, match="swap"):
        guess_bound(1.0, 0.0, 0.5, "swap")
