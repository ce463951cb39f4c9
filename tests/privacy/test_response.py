"""Randomised response: its law by enumeration of all coins, the privacy bound, and bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy import response as module
from hf_dp_xattn.privacy.accountant import epsilon_of
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.response import RandomizedResponse


def law(mechanism: RandomizedResponse, symbol: int, monkeypatch: pytest.MonkeyPatch) -> list[Fraction]:
    """P(answer = j), by running `draw` on every value that the exact uniform integer can take."""
    total = mechanism.odds + (mechanism.alphabet - 1) * module._UNIT
    monkeypatch.setattr(module, "uniform_below", lambda entropy, n, bound: np.arange(bound, dtype=np.int64))
    answers = mechanism.draw(np.full(total, symbol, dtype=np.int64), SeededEntropy(0))
    return [Fraction(int(c), total) for c in np.bincount(answers, minlength=mechanism.alphabet)]


def worst_ratio(laws: list[list[Fraction]]) -> Fraction:
    return max(p / q for a in laws for b in laws for p, q in zip(a, b, strict=True))


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 1.0, 3.0], ids=lambda e: f"eps={e:g}")
@pytest.mark.parametrize("alphabet", [2, 3, 7], ids=lambda k: f"k={k}")
def test_law_by_enumeration(alphabet: int, epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = RandomizedResponse.of(epsilon, alphabet)
    laws = [law(mechanism, c, monkeypatch) for c in range(alphabet)]
    assert all(sum(p) == 1 for p in laws)
    for c, p in enumerate(laws):
        assert float(p[c]) == pytest.approx(mechanism.truth, rel=1e-12)
        assert len({q for j, q in enumerate(p) if j != c}) == 1
    ratio = worst_ratio(laws)
    # at most e^epsilon, exactly; and attained but for the resolution of the odds
    assert math.log(ratio) <= epsilon
    assert math.log(ratio) > epsilon - 2 / module._UNIT


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Odds rounded up by one step break the bound that the enumeration checks, and are refused."""
    honest = RandomizedResponse.of(1.0, 3)
    with pytest.raises(ConfigError, match="more would be told"):
        RandomizedResponse(3, honest.epsilon, honest.odds + 1)
    planted = RandomizedResponse(3, Fraction(2), honest.odds + 1)
    assert math.log(worst_ratio([law(planted, c, monkeypatch) for c in range(3)])) > 1.0


@pytest.mark.parametrize(
    ("alphabet", "epsilon", "odds", "message"),
    [
        (4, Fraction(1, 10), 1 << 30, "more would be told"),
        (4, Fraction(1), module._UNIT - 1, "odds"),
        (4, Fraction(100), module._UNIT << 29, "odds"),
        (1, Fraction(1), module._UNIT, "symbols"),
        (4, Fraction(0), module._UNIT, "epsilon"),
        (4, 1.0, module._UNIT, "epsilon"),
    ],
)
def test_a_response_that_is_not_what_it_charges_is_refused(
    alphabet: int, epsilon: Fraction, odds: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RandomizedResponse(alphabet, epsilon, odds)


@given(st.floats(1e-6, 64.0), st.integers(2, 1 << 20))
def test_odds_never_exceed_epsilon(epsilon: float, alphabet: int) -> None:
    mechanism = RandomizedResponse.of(epsilon, alphabet)
    assert module._UNIT <= mechanism.odds <= module._UNIT << 28
    assert math.log(mechanism.odds / module._UNIT) <= epsilon * (1 + 1e-14)
    assert mechanism.epsilon <= Fraction(epsilon)
    assert math.log(mechanism.odds / module._UNIT) <= float(mechanism.epsilon) * (1 + 1e-14)
    assert mechanism.odds + (alphabet - 1) * module._UNIT <= 1 << 48


def test_charged_as_pure() -> None:
    assert epsilon_of([RandomizedResponse.of(2.0, 10).event], 1e-5) <= 2.0 + 1e-9


def test_truth_is_told_almost_always_at_large_epsilon() -> None:
    symbols = np.arange(1000, dtype=np.int64) % 64
    answers = RandomizedResponse.of(64.0, 64).draw(symbols, SeededEntropy(1))
    assert np.array_equal(answers, symbols)  # a lie has probability below 1000 * 63 / 2^28


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_bad_epsilon(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="epsilon"):
        RandomizedResponse.of(epsilon, 4)


@pytest.mark.parametrize("alphabet", [0, 1, (1 << 20) + 1])
def test_bad_alphabet(alphabet: int) -> None:
    with pytest.raises(ConfigError, match="symbols"):
        RandomizedResponse.of(1.0, alphabet)


@pytest.mark.parametrize("symbols", [[-1], [4], [[0]]], ids=["negative", "too large", "two dimensions"])
def test_bad_symbols(symbols: list[int]) -> None:
    with pytest.raises(ConfigError, match="Symbols"):
        RandomizedResponse.of(1.0, 4).draw(np.array(symbols, dtype=np.int64), SeededEntropy(0))
