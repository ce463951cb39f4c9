"""Response by rank: its law by enumeration of all coins, the privacy bound over all permutations, and bad input."""

from __future__ import annotations

import doctest
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy import rank_response as module
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bernoulli import exp_neg_bounds
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.rank_response import RankResponse
from hf_dp_xattn.privacy.response import RandomizedResponse

FALSE_ALARM = 1e-6


def small(counts: tuple[int, ...], weights: tuple[int, ...]) -> RankResponse:
    return RankResponse(counts, weights, Fraction(64))  # any small odds


def law(response: RankResponse, monkeypatch: pytest.MonkeyPatch) -> list[Fraction]:
    """P(rank), by running `draw` on every value that the exact uniform integer can take."""
    monkeypatch.setattr(module, "uniform_below", lambda entropy, n, bound: np.arange(bound, dtype=np.int64))
    ranks = response.draw(response.total, SeededEntropy(0))
    return [Fraction(int(c), response.total) for c in np.bincount(ranks, minlength=response.size)]


@pytest.mark.parametrize(
    ("counts", "weights"),
    [((1,), (1,)), ((1, 3), (7, 2)), ((2, 2, 1), (9, 4, 1)), ((3, 1), (5, 5))],
    ids=["one entry", "k-ary", "three levels", "uniform"],
)
def test_law_by_enumeration(
    counts: tuple[int, ...], weights: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    response = small(counts, weights)
    by_rank = [Fraction(w, response.total) for c, w in zip(counts, weights, strict=True) for _ in range(c)]
    assert law(response, monkeypatch) == by_rank
    assert [response.probability(r + 1) for r in range(response.size)] == [float(p) for p in by_rank]


def worst_ratio(by_rank: list[Fraction]) -> Fraction:
    """The largest ratio of an answer's probability under two units, over all pairs of permutations."""
    entries = range(len(by_rank))
    laws = [[by_rank[order[j]] for j in entries] for order in itertools.permutations(entries)]
    return max(a[j] / b[j] for a in laws for b in laws for j in entries)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 2.5], ids=lambda e: f"eps={e:g}")
@pytest.mark.parametrize("nearest", [1, 2, 3], ids=lambda t: f"t={t}")
def test_ratio_over_all_permutations(nearest: int, epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    response = RankResponse.of(epsilon, 4, nearest)
    ratio = worst_ratio(
        law(RankResponse((nearest, 4 - nearest), _coarse(response), Fraction(3)), monkeypatch)
    )
    low, _ = exp_neg_bounds(Fraction(epsilon), 200)
    assert Fraction(*response.weights) * low <= 1 << 200  # w_1 / w_K <= e^epsilon, exactly
    assert float(ratio) == pytest.approx(math.exp(epsilon), rel=0.1)  # and what is drawn is of that size


def _coarse(response: RankResponse) -> tuple[int, int]:
    """The weights in few enough steps to enumerate all coins."""
    return max(1, round(16 * response.weights[0] / response.weights[1])), 16


def test_a_planted_bug_is_caught() -> None:
    """Odds 3 % above what epsilon allows pass the bound that the exact check states."""
    response = RankResponse.of(1.0, 8, 2)
    low, _ = exp_neg_bounds(Fraction(1), 200)
    planted = (response.weights[0] * 103 // 100, response.weights[1])
    assert Fraction(*response.weights) * low <= 1 << 200 < Fraction(*planted) * low
    with pytest.raises(ConfigError, match="more would be told"):
        RankResponse(response.counts, planted, Fraction(1))


@given(st.fractions(Fraction(1, 1000), 16), st.integers(1, 1 << 20))
def test_one_step_above_epsilon_is_refused(epsilon: Fraction, unit: int) -> None:
    """The largest odds that epsilon allows pass, the next do not."""
    odds = math.floor(unit * Fraction(1 << 300, exp_neg_bounds(epsilon, 300)[1]))
    RankResponse((1, 1), (odds, unit), epsilon)
    with pytest.raises(ConfigError, match="more would be told"):
        RankResponse((1, 1), (odds + 1, unit), epsilon)


@given(st.floats(1e-6, 64.0), st.integers(2, 1 << 20), st.data())
def test_odds_never_exceed_epsilon(epsilon: float, size: int, data: st.DataObject) -> None:
    nearest = data.draw(st.integers(1, min(size - 1, 256)))
    response = RankResponse.of(epsilon, size, nearest)
    assert response.size == size and response.total <= 1 << 48
    low, _ = exp_neg_bounds(response.epsilon, 200)
    assert Fraction(*response.weights) * low <= 1 << 200
    assert response.epsilon <= Fraction(epsilon)
    assert epsilon_of([response.event], 1e-5) <= float(response.epsilon) * (1 + 1e-9)


def chi_squared(response: RankResponse, draws: np.ndarray) -> float:
    expected = np.array([response.probability(r + 1) for r in range(response.size)]) * len(draws)
    return float(((np.bincount(draws, minlength=response.size) - expected) ** 2 / expected).sum())


def test_draws_have_the_law_and_a_shifted_one_is_seen() -> None:
    from scipy.stats import chi2

    response = RankResponse.of(2.0, 12, 3)
    limit = float(chi2.isf(FALSE_ALARM, response.size - 1))
    draws = response.draw(200_000, SeededEntropy(3))
    assert chi_squared(response, draws) < limit
    lax = RankResponse.of(2.06, 12, 3)  # odds 6 % too large
    assert chi_squared(response, lax.draw(200_000, SeededEntropy(3))) > limit


def test_k_ary_is_the_profile_of_one() -> None:
    response = RankResponse.of(3.0, 100)
    assert response.probability(1) == RandomizedResponse.of(3.0, 100).truth


def test_expectation() -> None:
    response = small((1, 3), (3, 1))
    assert response.expect([6.0, 0.0, 3.0, 3.0]) == pytest.approx(4.0)
    with pytest.raises(ConfigError, match="one a rank"):
        response.expect([1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RankResponse.of(0.0, 4), "epsilon"),
        (lambda: RankResponse.of(math.nan, 4), "epsilon"),
        (lambda: RankResponse.of(1.0, 1), "nearest|symbols"),
        (lambda: RankResponse.of(1.0, (1 << 20) + 1), "symbols"),
        (lambda: RankResponse.of(1.0, 4, 4), "nearest"),
        (lambda: RankResponse.of(1.0, 4, 0), "nearest"),
        (lambda: RankResponse.of(1.0, 4, True), "nearest"),
        (lambda: small((1, 1), (1 << 48, 1)), "too large"),
        (lambda: small((1, 1), (1, 2)), "rise"),
        (lambda: RankResponse((1, 15), (10**6, 1), Fraction(1, 10)), "more would be told"),
        (lambda: RankResponse((1, 1), (1, 1), Fraction(0)), "epsilon"),
        (lambda: RankResponse((1, 1), (1, 1), Fraction(-1)), "epsilon"),
        (lambda: RankResponse((1, 1), (1, 1), math.nan), "epsilon"),
        (lambda: small((1, 0), (2, 1)), "positive"),
        (lambda: small((), ()), "at least one"),
        (lambda: small((1, 1), (1, 1)).probability(3), "Ranks"),
    ],
)  # fmt: skip
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_examples_run() -> None:
    assert doctest.testmod(module).failed == 0
