from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.kernel_sum.features import (
    PositiveRandomFeatures,
    TaylorFeatures,
    make_features,
    taylor_relative_error,
)

from ..paper_bounds import attention_relative_error
from .naive_kernel_sum import naive_taylor


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_taylor_features_equal_the_naive_twin(dim: int, degree: int) -> None:
    x = torch.randn(dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    features = TaylorFeatures(dim, degree)
    expected = torch.tensor(naive_taylor(x.tolist(), degree), dtype=torch.float64)
    assert features.size == math.comb(dim + degree, degree) == expected.numel()
    torch.testing.assert_close(features.key_features(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("degree", range(5))
def test_inner_product_is_the_taylor_polynomial(degree: int) -> None:
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 6, generator=gen, dtype=torch.float64)
    f = TaylorFeatures(6, degree)
    got = (f.key_features(x) * f.key_features(y)).sum(-1)
    dot = (x * y).sum(-1)
    torch.testing.assert_close(got, sum(dot**j / math.factorial(j) for j in range(degree + 1)))
    folded = (f.query_features(x, f.query_table()) * f.query_fold() * f.key_features(y)).sum(-1)
    torch.testing.assert_close(folded, got)


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("queries", [1, 255, 600], ids="m{}".format)
def test_query_sums_equal_the_plain_product(queries: int, degree: int) -> None:
    gen = torch.Generator().manual_seed(0)
    f = TaylorFeatures(11, degree)
    q = torch.randn(2, 3, queries, 11, generator=gen)
    sums = torch.randn(1, 3, f.size, 4, generator=gen)
    features = f.query_features(q, f.query_table())
    # float32 rounds in proportion to what is added up, in an order that the CPU's kernels choose
    error = (f.query_sums(q.mT, f.query_table(), sums).mT - features @ sums).abs()
    assert bool((error <= 2e-6 * (features.abs() @ sums.abs())).all())


@pytest.mark.parametrize("degree", range(5))
@pytest.mark.parametrize("bound", [0.1, 0.5, 1.0, 2.0, 4.0])
def test_relative_error_over_the_whole_declared_range(bound: float, degree: int) -> None:
    """|P_s(x)/e^x - 1| <= eps_s on a dense grid, attained at an end; the attention ratio stays within 2 eps_s/(1 - eps_s)."""
    eps_s = taylor_relative_error(bound, degree)
    grid = torch.linspace(-bound, bound, 20001, dtype=torch.float64)
    polynomial = sum(grid**j / math.factorial(j) for j in range(degree + 1))
    error = (polynomial / grid.exp() - 1).abs()
    assert float(error.max()) <= eps_s * (1 + 1e-9)
    assert float(error.max()) >= eps_s * (1 - 1e-9)


@given(st.integers(2, 4), st.floats(0.05, 1.0), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_attention_error_stays_within_the_papers_bound(degree: int, bound: float, seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    logits = (2 * torch.rand(7, 12, generator=gen, dtype=torch.float64) - 1) * bound
    logits[0, :6], logits[0, 6:] = bound, -bound  # the worst case: both ends at once
    value = torch.rand(12, 3, generator=gen, dtype=torch.float64)
    kernel = sum(logits**j / math.factorial(j) for j in range(degree + 1))
    got = kernel @ value / kernel.sum(-1, keepdim=True)
    exact = torch.softmax(logits, -1) @ value
    limit = attention_relative_error(taylor_relative_error(bound, degree))
    assert float(((got - exact) / exact).abs().max()) <= limit * (1 + 1e-9)


def test_known_errors() -> None:
    assert taylor_relative_error(0.5, 2) == pytest.approx(0.0304, abs=1e-3)
    assert [round(100 * taylor_relative_error(1.0, s), 1) for s in (2, 3, 4)] == [35.9, 9.4, 1.9]
    assert attention_relative_error(1.0) == math.inf


@pytest.mark.parametrize("dim", [4, 16])
def test_positive_random_features_are_unbiased_and_positive(dim: int) -> None:
    """Mean over 40 seeds within 6 standard errors (false alarm < 1e-6 over the 25 pairs by Bonferroni)."""
    gen = torch.Generator().manual_seed(3)
    x = torch.nn.functional.normalize(torch.randn(5, dim, generator=gen, dtype=torch.float64), dim=-1)
    y = torch.nn.functional.normalize(torch.randn(5, dim, generator=gen, dtype=torch.float64), dim=-1)
    estimates = []
    for seed in range(40):
        f = PositiveRandomFeatures(dim, 256, seed)
        a, b = f.key_features(x), f.key_features(y)
        assert bool((a > 0).all())
        q = f.query_features(x, f.query_table()) * f.query_fold()
        torch.testing.assert_close(q, a, rtol=1e-4, atol=1e-6)
        estimates.append(a @ b.mT)
    stacked = torch.stack(estimates)
    error = (stacked.mean(0) - (x @ y.mT).exp()).abs()
    deviation = stacked.std(0) / math.sqrt(40)
    assert bool((error <= 6.5 * deviation + 1e-9).all())
    # power: features without the |x|^2/2 term are off by a factor e and caught
    assert not bool(((stacked.mean(0) * math.e - (x @ y.mT).exp()).abs() <= 6.5 * deviation * math.e).all())


def test_random_directions_are_orthogonal_in_blocks() -> None:
    w = PositiveRandomFeatures(8, 20, 0).directions()
    unit = torch.nn.functional.normalize(w, dim=-1)
    for block in (unit[:8], unit[8:16], unit[16:]):
        torch.testing.assert_close(
            block @ block.mT, torch.eye(len(block), dtype=torch.float64), atol=1e-10, rtol=0
        )


def test_too_many_features_are_refused() -> None:
    with pytest.raises(ConfigError, match="features per head"):
        TaylorFeatures(128, 4)
    with pytest.raises(ConfigError, match="Unknown features"):
        make_features("softmax", 4, degree=2, num_features=8, seed=0)
