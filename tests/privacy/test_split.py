from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.accountant import (
    Event,
    GaussianEvent,
    LaplaceEvent,
    PureEvent,
    epsilon_of,
    gaussian_sigma_squared,
)
from hf_dp_xattn.privacy.noise import MAX_SIGMA_SQUARED
from hf_dp_xattn.privacy.split import gaussian_sigma_squared_beside

B = 2**34


def check(epsilon: float, delta: float, sensitivity: int, others: list[Event]) -> int | Fraction:
    """The composition costs at most epsilon; with 1e-5 less variance it would cost more, or no more than 1e-6 of epsilon is unused."""
    s2 = gaussian_sigma_squared_beside(epsilon, delta, sensitivity, others)
    spent = epsilon_of([*others, GaussianEvent(sensitivity, s2)], delta)
    assert spent <= epsilon
    if spent < epsilon * (1 - 1e-6):
        less = Fraction(s2) * Fraction(99_999, 100_000)
        assert epsilon_of([*others, GaussianEvent(sensitivity, less)], delta) > epsilon
    return s2


@given(
    st.floats(0.05, 20.0),
    st.sampled_from([1e-9, 1e-6, 1e-3]),
    st.integers(1, 2**36),
    st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_beside_gaussian_events(
    epsilon: float, delta: float, sensitivity: int, others: list[tuple[int, int]]
) -> None:
    """rho adds: the answer is known in closed form up to the search's tolerance."""
    whole = Fraction(gaussian_sigma_squared(epsilon, delta, 1))
    rho = 1 / (2 * whole)
    share = Fraction(9, 10) / len(others)
    events: list[Event] = [
        GaussianEvent(s, Fraction(s * s) / (2 * rho * share * Fraction(v, 1000))) for s, v in others
    ]
    left = rho - sum(rho * share * Fraction(v, 1000) for _, v in others)
    expected = Fraction(sensitivity**2) / (2 * left)
    assume(not 0.99 < expected / MAX_SIGMA_SQUARED < 1.01)
    if expected > MAX_SIGMA_SQUARED:  # refused before anything is charged
        with pytest.raises(ConfigError, match="sampler does not draw"):
            gaussian_sigma_squared_beside(epsilon, delta, sensitivity, events)
        return
    s2 = check(epsilon, delta, sensitivity, events)
    assert math.isclose(float(s2), float(expected), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("epsilon", "delta", "others"),
    [
        (8.0, 1e-5, [PureEvent(2)]),
        (2.0, 1e-6, [PureEvent(Fraction(3, 2))]),
        (1.0, 1e-6, [LaplaceEvent(2, 8), GaussianEvent(1, 300)]),
    ],
    ids=["pure", "mostly pure", "three kinds"],
)
def test_beside_unlike_events(epsilon: float, delta: float, others: list[Event]) -> None:
    s2 = check(epsilon, delta, B, others)
    assert s2 > gaussian_sigma_squared(epsilon, delta, B)
    assert isinstance(s2, int)


def test_with_nothing_beside() -> None:
    assert gaussian_sigma_squared_beside(2.0, 1e-5, B, []) == gaussian_sigma_squared(2.0, 1e-5, B)


def test_small_lattices_get_rationals() -> None:
    s2 = check(8.0, 1e-5, 1, [GaussianEvent(1, 4)])
    assert isinstance(s2, Fraction) and s2 < 4


@pytest.mark.parametrize(
    "others",
    [[PureEvent(2)], [PureEvent(3)], [GaussianEvent(10, 1)]],
    ids=["all but 1e-5", "more", "Gaussian"],
)
def test_nothing_left_is_refused(others: list[Event]) -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        gaussian_sigma_squared_beside(2.0, 1e-5, B, others)


def test_noise_that_the_sampler_cannot_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise epsilon"):
        gaussian_sigma_squared_beside(1e-9, 1e-5, B, [])
    with pytest.raises(ConfigError, match="lower epsilon"):
        gaussian_sigma_squared_beside(1e4, 1e-5, 1, [])


@pytest.mark.parametrize(
    ("epsilon", "delta", "sensitivity"),
    [
        (0.0, 1e-5, 1),
        (-1.0, 1e-5, 1),
        (math.nan, 1e-5, 1),
        (1.0, 0.0, 1),
        (1.0, 1.0, 1),
        (1.0, 1e-5, 0),
        (1.0, 1e-5, 1.5),
    ],
)
def test_bad_parameters_are_refused(epsilon: float, delta: float, sensitivity: int) -> None:
    for others in ([], [PureEvent(Fraction(1, 10))]):
        with pytest.raises(ConfigError):
            gaussian_sigma_squared_beside(epsilon, delta, sensitivity, others)
