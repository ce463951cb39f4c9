"""Truncated Laplace on the lattice: its law, and its (epsilon, delta) against the two distributions summed point by point."""

from __future__ import annotations

import itertools
import json
import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy import accountant
from hf_dp_xattn.privacy.accountant import (
    GaussianEvent,
    PureEvent,
    TruncatedLaplaceEvent,
    epsilon_of,
    event_from_dict,
    plain_epsilon,
)
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget, Ledger
from hf_dp_xattn.privacy.noise import discrete_laplace
from hf_dp_xattn.privacy.parameters import truncated_laplace_event
from hf_dp_xattn.privacy.truncated_laplace import off_support, tail_mass, truncated_laplace, truncation_bound

from .deltas import delta_of
from .laws import ALPHA, chi_square

LAWS = [(Fraction(1, 2), 3), (Fraction(7, 3), 5), (Fraction(5), 40), (Fraction(50), 30)]


def pmf(scale: Fraction, bound: int) -> np.ndarray:
    """P(-bound), ..., P(bound), summed in 40 digits."""
    with localcontext() as ctx:
        ctx.prec = 40
        rate = Decimal(scale.denominator) / Decimal(scale.numerator)
        weights = [(-rate * abs(z)).exp() for z in range(-bound, bound + 1)]
        return np.array([float(w / sum(weights)) for w in weights])


def joint_laws(scale: Fraction, bound: int, shift: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The laws of x + Z and x' + Z with x - x' = shift, flat, on one common grid."""
    one = pmf(scale, bound)
    p = q = np.ones(1)
    for s in shift:
        wide = np.pad(one, abs(s))
        p, q = np.outer(p, wide).ravel(), np.outer(q, np.roll(wide, s)).ravel()
    return p, q


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return max(np.maximum(a - math.exp(epsilon) * b, 0).sum() for a, b in ((p, q), (q, p)))


# --- the sampler


@pytest.mark.parametrize(("scale", "bound"), LAWS, ids=str)
def test_law(scale, bound):
    z = truncated_laplace(400_000, scale, bound, entropy=SeededEntropy(3))
    assert np.abs(z).max() <= bound
    counts = np.bincount(z + bound, minlength=2 * bound + 1)
    assert chi_square(counts, pmf(scale, bound)) >= ALPHA
    wider = pmf(scale * Fraction(11, 10), bound)  # power: a scale that is 10 % off is seen
    assert chi_square(counts, wider) < ALPHA


def test_rejection_only_redraws_what_lies_outside():
    """So the law is that of the exact discrete Laplace, conditioned: nothing is clamped to the bound."""
    first = discrete_laplace((50, 20), 9, entropy=SeededEntropy(1))
    z = truncated_laplace((50, 20), 9, 12, entropy=SeededEntropy(1))
    inside = np.abs(first) <= 12
    assert np.array_equal(z[inside], first[inside]) and 0.5 < inside.mean() < 0.9
    assert np.abs(z).max() <= 12


def test_seeded_and_system_entropy():
    a, b = (truncated_laplace((3, 4), 2**30, 2**33, entropy=SeededEntropy(5)) for _ in range(2))
    assert np.array_equal(a, b) and a.shape == (3, 4) and a.dtype == np.int64
    assert not np.array_equal(truncated_laplace(9, 2**30, 2**33), truncated_laplace(9, 2**30, 2**33))


# --- one number: the two distributions, summed


CASES = [(d, e, x) for d in (1, 2, 5, 9) for e in (0.25, 1.0, 4.0) for x in (1e-6, 1e-3, 0.05)]


@pytest.mark.parametrize(("sensitivity", "epsilon", "delta"), CASES, ids=str)
def test_epsilon_delta_by_direct_summation_for_every_shift(sensitivity, epsilon, delta):
    scale = Fraction(sensitivity) / Fraction(epsilon)
    bound = truncation_bound(scale, sensitivity, delta)
    sums = [
        hockey_stick(*joint_laws(scale, bound, (s,)), epsilon) for s in range(-sensitivity, sensitivity + 1)
    ]
    assert max(sums) <= delta * (1 + 1e-9)
    exact = float(tail_mass(scale, bound, sensitivity))
    assert math.isclose(max(sums), exact, rel_tol=1e-6, abs_tol=1e-15)  # summed in float64
    if bound > max(math.ceil(scale), sensitivity):  # and the bound is the smallest
        tighter = hockey_stick(*joint_laws(scale, bound - 1, (sensitivity,)), epsilon)
        assert tighter > delta * (1 - 1e-9)


def test_the_real_formula_approaches_ours_and_would_understate_on_a_coarse_lattice():
    for epsilon, delta in ((0.5, 1e-5), (3.0, 1e-3)):
        real = math.log1p(math.expm1(epsilon) / (2 * delta)) / epsilon  # in units of Delta
        sensitivity = 2**30
        ours = truncation_bound(Fraction(sensitivity) / Fraction(epsilon), sensitivity, delta)
        assert math.isclose(ours / sensitivity, real, rel_tol=1e-6)
    short = 0
    for delta in np.geomspace(
        1e-6, 1e-2, 20
    ).tolist():  # planted: the real formula, on a lattice of step Delta
        floor = math.floor(math.log1p(math.expm1(1.0) / (2 * delta)))
        short += hockey_stick(*joint_laws(Fraction(1), floor, (1,)), 1.0) > delta
    assert short > 5


@given(st.fractions(Fraction(1, 4), 40), st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_tail_mass_is_the_sum_of_the_outermost_masses_rounded_up(scale, bound, data):
    shift = data.draw(st.integers(0, bound))
    with localcontext() as ctx:
        ctx.prec = 90
        rate = Decimal(scale.denominator) / Decimal(scale.numerator)
        weights = {z: (-rate * z).exp() for z in range(bound + 1)}
        total = 2 * sum(weights.values()) - weights[0]
        exact = Fraction(sum((weights[z] for z in range(bound - shift + 1, bound + 1)), Decimal(0)) / total)
    got = tail_mass(scale, bound, shift)
    assert exact * (1 - Fraction(1, 10**60)) <= got <= exact * (1 + Fraction(1, 10**20)) + Fraction(1, 10**70)


# --- vectors


def shifts(dims: int, l1: int, largest: int) -> list[tuple[int, ...]]:
    reach = range(-largest, largest + 1)
    return [s for s in itertools.product(reach, repeat=dims) if 0 < sum(map(abs, s)) <= l1]


@pytest.mark.parametrize(
    ("dims", "l1", "largest"), [(1, 3, 3), (2, 3, 3), (2, 4, 2), (3, 3, 1), (2, 5, 3)], ids=str
)
def test_joint_release_by_enumeration(dims, l1, largest):
    scale, bound = Fraction(2), 7
    event = TruncatedLaplaceEvent(l1, scale, bound, largest)
    off, worst = float(off_support(event)), 0.0
    for shift in shifts(dims, l1, largest):
        p, q = joint_laws(scale, bound, shift)
        assert hockey_stick(p, q, float(l1 / scale)) <= off * (1 + 1e-9)
        worst = max(worst, p[q == 0].sum())
        for epsilon in (0.2, 0.6, 1.0):
            assert hockey_stick(p, q, epsilon) <= delta_of([event], epsilon)
        both = (p > 0) & (q > 0)
        p, q = p[both] / p[both].sum(), q[both] / q[both].sum()
        for index in range(0, len(accountant.ORDERS), 150):
            a = accountant.ORDERS[index]
            if a < 60:
                divergence = math.log((p**a * q ** (1 - a)).sum()) / (a - 1)
                assert divergence <= accountant.renyi_curve(accountant._split([event]))[index] * (1 + 1e-9)
    if dims * largest >= l1:  # the sum over coordinates is nearly attained
        assert worst >= off * (1 - 0.15)


def test_squared_sensitivity_is_used_and_sound():
    """Shifts of one in up to 6 of 6 coordinates, |s|_2^2 <= 6: the l2 curve, against the exact composition."""
    scale, bound = Fraction(8), 150
    event = TruncatedLaplaceEvent(6, scale, bound, 3, 6)
    loose = TruncatedLaplaceEvent(6, scale, bound, 3)
    p, q = joint_laws(scale, bound, (1,))
    ratio = np.unique(np.round(np.log(p[(p > 0) & (q > 0)] / q[(p > 0) & (q > 0)]), 12))
    assert len(ratio) == 2  # on the common support a step of one is randomised response
    for epsilon in (0.1, 0.3, 0.5):
        k = np.arange(7)
        likely = math.exp(1 / 8) / (1 + math.exp(1 / 8))
        up = np.array([math.comb(6, int(i)) for i in k]) * likely**k * (1 - likely) ** (6 - k)
        exact = np.maximum(up - math.exp(epsilon) * up[::-1], 0).sum() + float(off_support(event))
        assert exact <= delta_of([event], epsilon) <= delta_of([loose], epsilon)
    assert delta_of([event], 0.5) < 0.8 * delta_of([loose], 0.5)


@pytest.mark.parametrize(("count", "epsilon"), [(1, 0.5), (8, 0.4), (60, 0.1)], ids=str)
def test_composition_is_never_below_pld(count, epsilon):
    """Against dp-accounting's privacy loss distribution of the two mass functions themselves, `count` times."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    sensitivity, delta = 3, 1e-4
    scale = Fraction(sensitivity) / Fraction(epsilon)
    bound = truncation_bound(scale, sensitivity, delta / (4 * count))
    p, q = joint_laws(scale, bound, (sensitivity,))
    keys = range(p.size)
    tables = [
        {k: math.log(v) for k, v in zip(keys, m.tolist(), strict=True) if v > 0} for m in (q, p)
    ]  # lower, upper
    loss = pld.from_two_probability_mass_functions(*tables, value_discretization_interval=1e-3)
    exact = loss.self_compose(count).get_epsilon_for_delta(delta)
    for events in (
        [TruncatedLaplaceEvent(sensitivity, scale, bound)] * count,
        [
            TruncatedLaplaceEvent(sensitivity * count, scale, bound, sensitivity)
        ],  # one vector of `count` numbers
    ):
        ours = epsilon_of(events, delta)
        assert exact - 1e-3 * math.sqrt(count) <= ours <= count * epsilon * (1 + 1e-9)
        assert ours <= 1.6 * exact + 0.01


# --- the accountant and the ledger


def test_parameters_are_certified():
    for epsilon, delta, l1, largest, squared in (
        (1.0, 1e-5, 1, None, None),
        (8.0, 1e-5, 2**30, None, None),
        (0.1, 1e-9, 40, 10, None),
        (8.0, 1e-5, 2**40, 2**32, 2**66),
    ):
        event = truncated_laplace_event(epsilon, delta, l1, largest=largest, squared=squared)
        assert 0.99 * epsilon < epsilon_of([event], delta) <= epsilon
        assert delta_of([event], epsilon) <= delta * (1 + 1e-6)
        assert Fraction(event.scale) <= Fraction(l1) / Fraction(epsilon)
    many = truncated_laplace_event(1.0, 1e-5, 2**20, largest=2**8)
    assert plain_epsilon([many]) > 10  # composition is where the Renyi curve pays


def test_truncation_takes_its_delta_once_for_each_event():
    event = truncated_laplace_event(1.0, 1e-5, 4)
    off = float(off_support(event))
    assert epsilon_of([event] * 3, 2.9 * off) == math.inf
    assert epsilon_of([event], math.nextafter(off, 1.0)) <= plain_epsilon([event])
    assert delta_of([event] * 3, 100.0) >= 3 * off
    with pytest.raises(ConfigError):
        epsilon_of([event], 0)
    ignoring = epsilon_of([PureEvent(Fraction(1))] * 3, 2.9 * off)  # planted: truncation for free
    assert ignoring < math.inf


def test_mixed_lists_go_through_dp_accounting():
    event = truncated_laplace_event(1.0, 1e-6, 40, largest=4, squared=80)
    for other in (GaussianEvent(1, 4), PureEvent(Fraction(1, 2))):
        both = epsilon_of([event, other], 1e-5)
        assert both > max(epsilon_of([event], 1e-5), epsilon_of([other], 1e-5))
        assert both == epsilon_of([other, event], 1e-5)
        left = float(Fraction(1e-5) - off_support(event))
        if isinstance(other, GaussianEvent):
            assert both >= accountant.compose_unlike([event, other], left)


def test_events_survive_json_and_bad_ones_are_refused():
    event = TruncatedLaplaceEvent(2**60, Fraction(7, 3), 2**61, 2**50, Fraction(5, 2))
    data = json.loads(json.dumps(event.to_dict()))
    assert event_from_dict(data) == event
    assert event_from_dict(TruncatedLaplaceEvent(3, 1, 4).to_dict()) == TruncatedLaplaceEvent(3, 1, 4, 3, 9)
    for change in (
        {"largest": None},
        {"largest": 2**60 + 1},
        {"bound": 1},
        {"squared": "0"},
        {"squared": str(2**111)},
        {"scale": 2.0},
        {"surplus": 1},
    ):
        with pytest.raises(ConfigError):
            event_from_dict({**data, **change})


def test_ledger_charges_truncated_events(tmp_path):
    event = truncated_laplace_event(2.0, 1e-6, 30, largest=3)
    ledger = Ledger(tmp_path / "ledger.json")
    digest = ledger.digest([b"x"])
    charge = ledger.charge(digest, [event], Budget(8.0, 1e-5))
    assert charge.epsilon_after == epsilon_of([event], 1e-5)
    again = Ledger(tmp_path / "ledger.json")
    assert again.charges(digest)[0].events == (event,)
    assert again.spent(digest, 1e-5) == charge.epsilon_after and again.spent(digest, 0) == math.inf
    assert again.spent(digest, 1e-9) == math.inf  # less than truncation takes


@pytest.mark.parametrize("bad", (0, -1, 1.5, True, None, "1"))
def test_invalid_arguments(bad):
    for call in (
        lambda: truncated_laplace(3, 8, bad),
        lambda: TruncatedLaplaceEvent(bad, 1, 1),
        lambda: TruncatedLaplaceEvent(1, 1, bad),
        lambda: truncation_bound(1, bad, 0.1),
        lambda: truncated_laplace_event(1.0, 0.1, bad),
    ):
        with pytest.raises(ConfigError):
            call()
    with pytest.raises(ConfigError, match="scale / 16"):
        truncated_laplace(3, 100, 2)
    with pytest.raises(ConfigError):
        truncation_bound(1, 1, 0.0)
    with pytest.raises(ConfigError):
        tail_mass(Fraction(1), 3, 4)
