"""The learned sum: its naive twin, sensitivity in exact integers, batch invariance, the noise's law, bad input."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.mechanisms import inputs
from hf_dp_xattn.mechanisms.anchors.row_sum import PreparedRowSum, RowSum
from hf_dp_xattn.privacy.accountant import GaussianEvent, PureEvent, epsilon_of
from hf_dp_xattn.privacy.noise import SeededEntropy

from ...privacy.laws import Law, accepted
from .noised import release

C, K = 12, 5
RELATIONS = ["replace_one", "add_or_remove_one"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gen = generator(seed)
    return (
        torch.randn(C, generator=gen),
        torch.randn(K, C, generator=gen) / C**0.5 / 2,
        torch.randn(K, generator=gen) / 10,
    )


def make(relation: str = "replace_one", seed: int = 0) -> PreparedRowSum:
    return RowSum.from_tensors(*parameters(seed), reach=32.0).prepare(2.0, 1e-6, neighboring=relation)


def naive_sum(
    center: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The float64 twin, row by row."""
    total = torch.zeros(K, dtype=torch.float64)
    for row in rows.double():
        v = matrix.double() @ (row - center.double()) + bias.double()
        total += v * min(1.0, 1.0 / max(float(v.norm()), 1e-300))
    return total


def test_sums_equal_the_naive_twin() -> None:
    rows = torch.randn(40, C, generator=generator(1)) * 3
    p = make()
    got = p.exact_sums(rows).double() * 2.0**-p.exponent
    # coordinates are read to 2^-14 (reach 32 in 19 bits), and a clipped vector gives up 2^-20 of its norm
    assert float((got - naive_sum(*parameters(), rows)).abs().max()) < 1e-3


def test_features_are_what_rows_contribute() -> None:
    p = make()
    rows = torch.randn(30, C, generator=generator(2)) * 2
    f = p.row_sum.features(rows)
    assert f.shape == (30, K) and float(f.norm(dim=-1).max()) <= 1.0
    assert torch.equal(f.sum(0), p.exact_sums(rows).double() * 2.0**-p.exponent)
    assert p.row_sum.features(rows[:0]).shape == (0, K)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e30), st.sampled_from(RELATIONS))
@settings(max_examples=150, deadline=None)
def test_sensitivity_in_exact_integers(seed: int, size: float, relation: str) -> None:
    """The changed row may be of any magnitude, or gone."""
    gen = generator(seed)
    p = make(relation, seed % 5)
    rest, before = torch.randn(6, C, generator=gen), torch.randn(1, C, generator=gen) * size
    if relation == "add_or_remove_one":
        after = before[:0]
    else:
        after = -before if seed % 2 else torch.randn(1, C, generator=gen) * size
    one, other = (p.exact_sums(torch.cat([rest, changed])).tolist() for changed in (before, after))
    event = p.events[0]
    assert isinstance(event, GaussianEvent)
    assert event.sensitivity == (2 if relation == "replace_one" else 1) * p.bound
    assert sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) <= event.sensitivity**2
    assert p.bound == 2**p.exponent


def test_the_bounds_are_attained() -> None:
    """Power: opposite rows move the sum by more than 1.99 B, so neither B nor the histogram's sqrt(2) B would do."""
    affine = (torch.zeros(1), torch.ones(1, 1), torch.zeros(1))
    p = RowSum.from_tensors(*affine, reach=8.0).prepare(1.0, 1e-5, neighboring="replace_one")
    rows = torch.full((1, 1), 5.0)
    moved = int((p.exact_sums(rows) - p.exact_sums(-rows)).abs())
    assert 1.99 * p.bound < moved <= 2 * p.bound


@given(st.integers(0, 10**6), st.integers(1, 50), st.sampled_from([2**24, 40, 1]))
@settings(max_examples=60, deadline=None)
def test_sums_are_those_of_the_rows_alone_bit_for_bit(seed: int, n: int, chunk: int) -> None:
    gen = generator(seed)
    p = make("add_or_remove_one")
    rows = torch.randn(n, C, generator=gen) * 10.0 ** (seed % 5 - 2)
    whole = p.exact_sums(rows)
    order = torch.randperm(n, generator=gen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "_CHUNK_ENTRIES", chunk)
        assert torch.equal(p.exact_sums(rows[order]), whole)
    assert torch.equal(torch.stack([p.exact_sums(row[None]) for row in rows]).sum(0), whole)


@pytest.mark.parametrize("relation", RELATIONS)
def test_noise_has_its_law(relation: str) -> None:
    """A release of 100,000 coordinates; false alarms below 1e-6 (laws.ALPHA = 1e-8 per statistic)."""
    k = 100_000
    r = RowSum.from_tensors(torch.zeros(1), torch.ones(k, 1) / k**0.5, torch.zeros(k), reach=4.0)
    p = r.prepare(2.0, 1e-5, neighboring=relation)
    rows = torch.tensor([[0.5], [3.0]])
    y = release(p, rows, entropy=SeededEntropy(11))
    z = (y * 2.0**p.exponent).to(torch.int64) - p.exact_sums(rows)
    assert accepted(z.numpy(), Law("gaussian", p.sigma_squared))
    assert not accepted(z.numpy(), Law("gaussian", p.sigma_squared * Fraction(11, 10)))  # power
    assert math.isclose(float(z.double().std()) * 2.0**-p.exponent, p.sigma, rel_tol=0.02)


def test_release_is_seeded_only_on_request() -> None:
    p = make()
    rows = torch.randn(7, C)
    assert torch.equal(release(p, rows, entropy=SeededEntropy(1)), release(p, rows, entropy=SeededEntropy(1)))
    y = release(p, rows)
    assert not torch.equal(y, release(p, rows)) and y.dtype == torch.float64 and y.shape == (K,)


@pytest.mark.parametrize("relation", RELATIONS)
def test_events_cost_epsilon(relation: str) -> None:
    r = RowSum.from_tensors(*parameters(), reach=32.0)
    for epsilon in (0.1, 1.0, 16.0):
        p = r.prepare(epsilon, 1e-6, neighboring=relation)
        assert 0.999 * epsilon <= epsilon_of(p.events, 1e-6) <= epsilon
    other = PureEvent(Fraction(1, 2))
    p = r.prepare(2.0, 1e-6, neighboring=relation, beside=(other,))
    assert 1.99 <= epsilon_of([other, *p.events], 1e-6) <= 2.0


def test_an_empty_context() -> None:
    empty = torch.zeros(0, C)
    with pytest.raises(ContextError, match="no rows"):
        release(make(), empty)
    # the number of rows is private here: no rows must look like few rows
    assert release(make("add_or_remove_one"), empty).shape == (K,)


def test_bad_rows_are_refused() -> None:
    p = make()
    for bad in (float("nan"), float("inf"), float("-inf")):
        rows = torch.zeros(4, C)
        rows[1, 3] = bad
        for call in (lambda rows: release(p, rows), p.row_sum.features):
            with pytest.raises(ContextError, match="NaN or Inf"):
                call(rows)
    for rows in (torch.zeros(C), torch.zeros(2, C + 1), torch.zeros(2, C, dtype=torch.long)):
        with pytest.raises(ConfigError, match="float tensor"):
            release(p, rows)


def test_bad_parameters_are_refused() -> None:
    center, matrix, bias = parameters()
    for bad in (
        (center[:3], matrix, bias),
        (center, matrix[0], bias),
        (center, matrix, bias[:2]),
        (center, matrix * math.nan, bias),
    ):
        with pytest.raises(ConfigError):
            RowSum.from_tensors(*bad, reach=1.0)
    r = RowSum.from_tensors(center, matrix, bias, reach=1.0)
    for epsilon, delta in ((0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0), (1e-9, 1e-5)):
        with pytest.raises(ConfigError):
            r.prepare(epsilon, delta, neighboring="replace_one")
    with pytest.raises(ConfigError, match="Unknown unit"):
        r.prepare(1.0, 1e-5, neighboring="some")
    with pytest.raises(ConfigError, match="nothing is left"):
        r.prepare(1.0, 1e-5, neighboring="replace_one", beside=(PureEvent(1),))
