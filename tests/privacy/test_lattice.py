from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.privacy.lattice import (
    ENTRY_BITS,
    ROWS_PER_CHUNK,
    exact_exp,
    exact_matmul,
    power_of_two,
    quantize,
    sequential_sum,
)


@pytest.mark.parametrize("shape", [(3, 5, 4), (17, 129, 8), (1, 2048, 1)], ids=str)
def test_product_of_extreme_integers_is_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    gen = torch.Generator().manual_seed(0)
    limit = 2**ENTRY_BITS
    a = torch.randint(-limit, limit + 1, (m, k), generator=gen)
    b = torch.randint(-limit, limit + 1, (k, n), generator=gen)
    a[0], b[:, 0] = limit, limit  # the worst case: all products add up
    product = exact_matmul(a.double(), b.double(), k * 4.0**ENTRY_BITS)
    assert torch.equal(product.long(), (a.unsqueeze(-1) * b.unsqueeze(0)).sum(1))


def test_product_that_may_be_inexact_is_refused() -> None:
    x = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ConfigError, match="not exact"):
        exact_matmul(x, x, 2.0**53)
    assert ROWS_PER_CHUNK * 4**ENTRY_BITS < 2**53


def test_the_limit_is_where_float64_stops_being_exact() -> None:
    """Power: one step beyond the limit, a float64 sum is wrong, and the comparison above would notice."""
    a = torch.tensor([[2.0**52, 2.0**52, 1.0]], dtype=torch.float64)
    assert (a.sum()).item() != 2**53 + 1


@given(st.floats(-7.9, 7.9, allow_nan=False))
@settings(max_examples=200, deadline=None)
def test_exact_exp_is_accurate(x: float) -> None:
    got = float(exact_exp(torch.tensor([x], dtype=torch.float64)))
    assert math.isclose(got, math.exp(x), rel_tol=1e-12)


def test_exact_exp_does_not_depend_on_position() -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    whole = exact_exp(x)
    one_by_one = torch.cat([exact_exp(v.reshape(1)) for v in x])
    assert torch.equal(whole, one_by_one)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(-10, 20))
@settings(max_examples=100, deadline=None)
def test_quantize_rounds_to_nearest_and_clamps(values: list[float], exponent: int) -> None:
    limit = 2**20
    got = quantize(torch.tensor(values, dtype=torch.float64), float(power_of_two([exponent])[0]), limit)
    for v, q in zip(values, got.tolist(), strict=True):
        exact = Fraction(v) * Fraction(2) ** exponent
        assert abs(q) <= limit and q == int(q)
        assert abs(exact) > limit or abs(Fraction(q) - exact) <= Fraction(1, 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 1000])
def test_sequential_sum_does_not_depend_on_other_rows(rows: int) -> None:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 37, generator=gen, dtype=torch.float64)
    assert torch.equal(sequential_sum(x)[:rows], sequential_sum(x[:rows]))
