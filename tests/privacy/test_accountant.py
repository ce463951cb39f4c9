"""The accountant against dp-accounting, exact discrete sums and exact rationals."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.accountant import (
    ORDERS,
    GaussianEvent,
    LaplaceEvent,
    PureEvent,
    epsilon_of,
    event_from_dict,
    gaussian_sigma_squared,
    laplace_scale,
    pure_epsilon,
    to_dp_event,
)

from .deltas import delta_of

NO_SHRINK = (Phase.explicit, Phase.reuse, Phase.generate)  # shrinking Fractions can take minutes
EPSILONS = (0.01, 0.1, 1.0, 8.0, 64.0, 1000.0)
DELTAS = (1e-12, 1e-5, 0.1)


def rdp_epsilon(events, delta):
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE)
    return accountant.compose(to_dp_event(events, pure_as="randomized_response")).get_epsilon(delta)


def pld_epsilon(events, delta, interval=1e-4):
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=interval)
    return accountant.compose(to_dp_event(events, pure_as="discrete_laplace")).get_epsilon(delta)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_sigma_is_certified_minimal_and_above_the_exact_gaussian(epsilon, delta):
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    for sensitivity in (1, 7, 2**40):
        variance = gaussian_sigma_squared(epsilon, delta, sensitivity)
        event = GaussianEvent(sensitivity, variance)
        got = epsilon_of([event], delta)
        assert got <= epsilon
        smaller = Fraction(variance) * (1 - Fraction(1, 10**6))
        assert epsilon_of([GaussianEvent(sensitivity, smaller)], delta) > epsilon
        assert delta_of([event], epsilon) <= delta * (1 + 1e-6)
        assert got >= rdp_epsilon([event], delta)
    exact = get_epsilon_gaussian(math.sqrt(Fraction(variance) / sensitivity**2), delta)
    assert exact <= got  # the continuous Gaussian, exactly (Balle and Wang): ours is an upper bound


@pytest.mark.parametrize("epsilon", (0.1, 1.0, 8.0, 40.0))
@pytest.mark.parametrize("delta", (1e-8, 1e-5, 0.01))
def test_never_below_pld(epsilon, delta):
    gaussian = [GaussianEvent(3, gaussian_sigma_squared(epsilon, delta, 3))]
    assert epsilon_of(gaussian, delta) >= pld_epsilon(gaussian, delta, 1e-4 if epsilon < 2 else 1e-3)
    laplace = [LaplaceEvent(3, laplace_scale(epsilon, 3))]
    assert epsilon_of(laplace, delta) >= pld_epsilon(laplace, delta, 1e-3) - 1e-9
    if epsilon <= 8:
        mixed = [*gaussian, *laplace, *laplace]
        assert epsilon_of(mixed, delta) >= pld_epsilon(mixed, delta, 1e-3)


def exact_delta(pmf_p, pmf_q, epsilon):
    return float(np.maximum(pmf_p - math.exp(epsilon) * pmf_q, 0).sum())


@pytest.mark.parametrize("sigma2", (Fraction(1, 20), Fraction(1, 2), 1, 5))
@pytest.mark.parametrize("shift", (1, 2))
def test_covers_the_discrete_gaussian_summed_exactly(sigma2, shift):
    z = np.arange(-400, 401)
    p = np.exp(-(z**2) / (2 * float(sigma2)))
    q = np.exp(-((z - shift) ** 2) / (2 * float(sigma2)))
    p, q = p / p.sum(), q / q.sum()
    for epsilon in (0.05, 0.5, 2.0, 10.0):
        assert exact_delta(p, q, epsilon) <= delta_of([GaussianEvent(shift, sigma2)], epsilon)


def test_continuous_laplace_curve_would_understate_the_discrete_mechanism():
    """Power: at sensitivity 1 the discrete Laplace mechanism is randomised response."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    n, eps, delta = 40, 0.5, 1e-5
    ours = epsilon_of([LaplaceEvent(1, 2)] * n, delta)
    continuous = RdpAccountant(ORDERS).compose(dp_accounting.LaplaceDpEvent(2.0), n).get_epsilon(delta)
    assert continuous < ours <= n * eps
    k = np.arange(n + 1)
    p = np.exp(eps) / (1 + np.exp(eps))
    log_binomial = np.array([math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in k])
    up = np.exp(log_binomial + k * math.log(p) + (n - k) * math.log(1 - p))
    down = up[::-1]
    assert exact_delta(up, down, ours) <= delta
    # The exact Renyi divergence at order 2 lies above the continuous curve, and on ours.
    order2 = math.log(np.sum(up**2 / down)) / n
    from dp_accounting.rdp.rdp_privacy_accountant import _laplace_rdp

    assert order2 > _laplace_rdp(eps, 2.0) * 1.01


def test_pure_events():
    assert epsilon_of([LaplaceEvent(2, Fraction(1, 4))], 0) == 8.0
    assert epsilon_of([LaplaceEvent(2, Fraction(1, 4)), PureEvent(1)], 0) == 9.0
    assert delta_of([LaplaceEvent(1, 1)], 1.0) == 0.0
    assert epsilon_of([LaplaceEvent(1, 1)], 0.9) == 0.0  # total variation below delta
    assert epsilon_of([PureEvent(1000)] * 3, 1e-12) <= 3000.0
    assert epsilon_of([LaplaceEvent(1, 3)], 0) >= Fraction(1, 3)
    for epsilon in (*EPSILONS, Fraction(1, 3)):
        assert pure_epsilon(LaplaceEvent(5, laplace_scale(epsilon, 5))) == Fraction(epsilon)
    assert epsilon_of([], 1e-5) == 0.0 and epsilon_of([], 0) == 0.0


events_strategy = st.lists(
    st.one_of(
        st.builds(GaussianEvent, st.integers(1, 1000), st.fractions(1, 10**9, max_denominator=1000)),
        st.builds(LaplaceEvent, st.integers(1, 50), st.fractions(5, 10**5, max_denominator=1000)),
        st.builds(PureEvent, st.fractions(Fraction(1, 1000), 20, max_denominator=1000)),
    ),
    min_size=1,
    max_size=6,
)


def check_against_dp_accounting(events, delta):
    ours, theirs = epsilon_of(events, delta), rdp_epsilon(events, delta)
    plain = math.inf
    if not any(isinstance(e, GaussianEvent) for e in events):
        plain = float(sum(pure_epsilon(e) for e in events))
    assert ours >= min(theirs, plain) * (1 - 1e-9)  # theirs: RR noise parameter in float64
    assert ours <= theirs * (1 + 1e-6) + 1e-6
    assert epsilon_of(events[::-1], delta) == ours
    assert epsilon_of([*events, events[0]], delta) >= ours
    if 0 < ours < 600:
        assert delta_of(events, ours) <= delta * (1 + 1e-6)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, phases=NO_SHRINK)
@given(events_strategy, st.floats(1e-12, 0.1))
def test_never_below_dp_accounting(events, delta):
    check_against_dp_accounting(events, delta)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, phases=NO_SHRINK)
@given(events_strategy, st.floats(1e-12, 0.1))
def test_never_below_dp_accounting_longer(events, delta):
    check_against_dp_accounting(events, delta)


@settings(max_examples=40, deadline=None, phases=NO_SHRINK)
@given(st.floats(0.01, 1000), st.floats(1e-12, 0.1), st.integers(1, 2**50))
def test_sigma_round_trip(epsilon, delta, sensitivity):
    variance = gaussian_sigma_squared(epsilon, delta, sensitivity)
    assert epsilon_of([GaussianEvent(sensitivity, variance)], delta) <= epsilon
    assert rdp_epsilon([GaussianEvent(sensitivity, variance)], delta) <= epsilon


@given(events_strategy)
def test_events_survive_json(events):
    assert [event_from_dict(json.loads(json.dumps(e.to_dict()))) for e in events] == events


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "exponential", "epsilon": "1"},
        {"kind": "gaussian", "sensitivity": 1},
        {"kind": "gaussian", "sensitivity": 1, "sigma_squared": "1", "note": "x"},
        {"kind": "gaussian", "sensitivity": 1, "sigma_squared": 1.5},
        {"kind": "gaussian", "sensitivity": "1", "sigma_squared": "1"},
        {"kind": "gaussian", "sensitivity": True, "sigma_squared": "1"},
        {"kind": "laplace", "sensitivity": 1, "scale": "-1"},
        {"kind": "laplace", "sensitivity": 1, "scale": "1/0"},
        {"kind": "pure", "epsilon": "0"},
        {"kind": ["pure"], "epsilon": "1"},
    ],
)
def test_unknown_events_are_refused(data):
    with pytest.raises(ConfigError):
        event_from_dict(data)


@pytest.mark.parametrize("bad", (0, -1.0, math.nan, math.inf, "1", True, None))
def test_invalid_arguments(bad):
    for call in (
        lambda: gaussian_sigma_squared(bad, 1e-5, 1),
        lambda: gaussian_sigma_squared(1.0, bad, 1),
        lambda: gaussian_sigma_squared(1.0, 1e-5, bad),
        lambda: laplace_scale(bad, 1),
        lambda: laplace_scale(1.0, bad),
        lambda: delta_of([PureEvent(1)], bad),
        lambda: epsilon_of([GaussianEvent(1, 1)], bad),
        lambda: GaussianEvent(1, bad),
        lambda: LaplaceEvent(bad, 1),
        lambda: PureEvent(bad),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError):
        epsilon_of(["gaussian"], 1e-5)
    with pytest.raises(ConfigError):
        GaussianEvent(1, 1.5)


def test_unlike_releases_go_through_dp_accounting(monkeypatch):
    """A mixed list is composed by dp-accounting too, and the larger answer counts (planted: ours halved is not returned)."""
    from hf_dp_xattn.privacy import accountant

    events = [GaussianEvent(2, 9), LaplaceEvent(1, 2)]
    theirs = accountant.compose_unlike(events, 1e-5)
    assert epsilon_of(events, 1e-5) >= theirs > 0
    monkeypatch.setattr(accountant, "epsilon_of_curve", lambda *_: theirs / 2)
    assert epsilon_of(events, 1e-5) == theirs


def test_programs_that_make_underflow_an_error() -> None:
    events = [PureEvent(8), GaussianEvent(1, 1)]
    with np.errstate(all="raise"):
        strict = epsilon_of(events, 1e-5)
    assert strict == epsilon_of(events, 1e-5)
