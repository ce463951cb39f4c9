"""Joint answers: their law by enumeration of all coins, the ratio over all units, sizes of their own for each place, and bad input."""

from __future__ import annotations

import doctest
import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy import joint_response as module
from hf_dp_xattn.privacy.bernoulli import exp_neg_bounds
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.joint_response import PlacedResponse, ProductResponse
from hf_dp_xattn.privacy.rank_response import RankResponse

CASES = [((4,), 0), ((2, 3), 0), ((2, 3), 1), ((3, 1, 2), 1), ((2, 2, 2), 2)]


def law(
    response: ProductResponse, own: tuple[int, ...], patch: pytest.MonkeyPatch
) -> Counter[tuple[int, ...]]:
    """How many coins give each tuple, by running the release on all of them."""
    patch.setattr(module, "uniform_below", lambda entropy, n, bound: np.arange(bound, dtype=np.int64)[:n])
    integers = torch.tensor(own)[:, None].repeat(response.total, 1)
    answers = response.perturb(integers, SeededEntropy(0)).view(response.total, -1)
    return Counter(map(tuple, answers.tolist()))


@pytest.mark.parametrize(("sizes", "wrong"), CASES)
def test_law_by_enumeration(sizes: tuple[int, ...], wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    response = ProductResponse(sizes, wrong, 7, 2, Fraction(64))
    every = list(itertools.product(*map(range, sizes)))
    laws = {own: law(response, own, monkeypatch) for own in every}
    for own, found in laws.items():
        for y in every:
            differ = sum(a != b for a, b in zip(own, y, strict=True))
            assert found[y] == (7 if differ <= wrong else 2)
    far = max(Fraction(a[y], b[y]) for a in laws.values() for b in laws.values() for y in every)
    assert far <= Fraction(7, 2)
    near = [y for y in every if sum(y[i] != 0 for i in range(len(sizes))) <= wrong]
    assert len(near) == response.near
    for part in range(len(sizes)):
        assert response.right(part) == pytest.approx(sum(y[part] == 0 for y in near) / len(near))


@given(st.floats(1e-3, 40.0), st.lists(st.integers(1, 500), min_size=1, max_size=4), st.integers(0, 1))
def test_odds_never_exceed_epsilon(epsilon: float, sizes: list[int], wrong: int) -> None:
    response = ProductResponse.of(epsilon, sizes, min(wrong, len(sizes) - 1))
    low, _ = exp_neg_bounds(response.epsilon, 200)
    assert Fraction(response.odds, response.unit) * low <= 1 << 200
    assert response.epsilon <= Fraction(epsilon) and response.total <= 1 << 48
    if 3.0 < epsilon < 16.0 and math.prod(sizes) < 2**20:
        assert response.odds / response.unit > 0.95 * math.exp(epsilon)  # and they are used up


def test_a_planted_bug_is_caught() -> None:
    response = ProductResponse.of(2.0, (4, 5))
    with pytest.raises(ConfigError, match="more would be told"):
        ProductResponse(response.sizes, 0, response.odds * 103 // 100, response.unit, response.epsilon)


def test_one_draw_tells_more_than_shares() -> None:
    """Three parts of 16 texts at epsilon 8: all right together far more often than each at 8/3."""
    each = RankResponse.of(Fraction(8, 3), 16).probability(1) ** 3
    response = ProductResponse.of(8.0, (16, 16, 16))
    assert response.odds / response.total > 3 * each


def test_places_have_lists_of_their_own() -> None:
    placed = PlacedResponse((RankResponse.of(2.0, 3), RankResponse.of(2.0, 40, 4)))
    integers = torch.tensor([[0, 2, 0, 0, 0], [1, 7, 3, 39, 1]]).repeat(4000, 1)
    answers = placed.perturb(integers, SeededEntropy(3)).view(-1, 2).numpy()
    for unit, response in enumerate(placed.responses):
        own = integers[unit, 1 : 1 + response.near].tolist()
        share = np.isin(answers[:, unit], own).mean()
        wanted = response.near * response.probability(1)
        assert abs(share - wanted) < 6 * math.sqrt(wanted * (1 - wanted) / 4000)  # false alarm below 1e-8
        assert answers[:, unit].min() >= 0 and answers[:, unit].max() < response.size
    exact = placed.log_weights(integers[:2], np.array([[2, 7], [2, 0], [0, 0]]))
    assert (exact - exact[2])[:2] == pytest.approx([4.0, 2.0], abs=1e-3)
    assert float(placed.event.epsilon) <= 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProductResponse.of(0.0, (2,)), "epsilon"),
        (lambda: ProductResponse.of(1.0, ()), "parts"),
        (lambda: ProductResponse.of(1.0, (2,) * 17), "parts"),
        (lambda: ProductResponse.of(1.0, (0, 2)), "parts|combinations"),
        (lambda: ProductResponse.of(1.0, (2, 2), 2), "wrong"),
        (lambda: ProductResponse.of(1.0, (2**20,) * 3), "combinations"),
        (lambda: ProductResponse.of(1.0, (2, 2)).perturb(torch.zeros(3, 1).long(), SeededEntropy(0)), "2 parts"),
        (lambda: ProductResponse.of(1.0, (2, 2)).perturb(torch.full((2, 1), 2), SeededEntropy(0)), "not on its list"),
        (lambda: PlacedResponse(()), "one place"),
        (lambda: PlacedResponse((RankResponse.of(1.0, 3),)).perturb(torch.tensor([[1, 0]]), SeededEntropy(0)), "Places"),
        (lambda: PlacedResponse((RankResponse.of(1.0, 3),)).perturb(torch.tensor([[0]]), SeededEntropy(0)), "nearest"),
    ],
)  # fmt: skip
def test_bad_input(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0
