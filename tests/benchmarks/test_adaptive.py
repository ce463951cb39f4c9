"""Adaptive queries: an adversary that knows the data and sees every answer, 10^4 queries, against the stated bounds."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_dp_xattn.mechanisms.kernel_sum.kernel_sum as kernel_sum
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.dptree import DPTreeSoftmax
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.features import TaylorFeatures
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.bits import SeededEntropy

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from paper_parts.median_of_copies import MedianOfCopies, copies_for, gaussian_uniform_bound, net_size

Error = Callable[[torch.Tensor], torch.Tensor]
CHAINS, ROUNDS = 100, 100  # 10^4 queries


def into_ball(y: torch.Tensor, radius: float) -> torch.Tensor:
    return y * (radius / y.norm(dim=-1, keepdim=True)).clamp_max(1.0)


def attack(error: Error, dim: int, radius: float, seed: int = 0) -> tuple[float, float]:
    """(largest error found, largest of as many queries that do not adapt).

    Each of the chains moves to the query that gave the larger error, by steps that grow on success and shrink on failure: every query
    follows from the answers so far. `error` is the true one, for the adversary knows the data.
    """
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    plain = float(error(into_ball(normal(CHAINS * ROUNDS, dim) * radius * 0.6, radius)).abs().max())
    y, step = (
        into_ball(normal(CHAINS, dim) * radius * 0.6, radius),
        torch.full((CHAINS, 1), radius / 2).double(),
    )
    best = error(y).abs()
    for _ in range(ROUNDS - 1):
        other = into_ball(y + step * normal(CHAINS, dim), radius)
        found = error(other).abs()
        better = (found > best).unsqueeze(-1)
        y, best = torch.where(better, other, y), torch.maximum(best, found)
        step = step * torch.where(better, 1.6, 0.85)
    return float(best.max()), plain


def context(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(3)
    return torch.randn(n, d, generator=gen) * 0.7, torch.rand(n, generator=gen) * 2 - 1


def true_sum(
    keys: torch.Tensor, weights: torch.Tensor, degree: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """sum_i w_i <P(x_i), P(y)> without noise; keys and queries mapped (times scale^(1/2)) and inside the ball."""
    features, half = TaylorFeatures(keys.shape[1], degree), keys.shape[1] ** -0.25
    p = features.key_features(into_ball(keys.double() * half, 1.0))
    return lambda y: features.key_features(y) @ (p.mT @ weights.double())


@pytest.mark.parametrize(("d", "degree"), [(2, 2), (4, 2), (6, 1)], ids=str)
def test_trees_against_an_adaptive_adversary(d: int, degree: int) -> None:
    keys, weights = context(60, d)
    truth, half = true_sum(keys, weights, degree), d**-0.25
    for seed in range(3):
        tree = DPTreeSoftmax.init(
            keys, weights, degree=degree, bins=8, epsilon=2.0, delta=1e-5, entropy=SeededEntropy(seed)
        )
        worst, plain = attack(lambda y, tree=tree: tree.query(y / half)[..., 0] - truth(y), d, 1.0, seed)
        assert worst <= tree.uniform_error_bound(1e-6)
        assert worst >= plain * 0.98 and worst > tree.error_bound(0.5) / 20  # it does look for the worst
        limit = tree.split.event.bound / float(tree.split.event.scale) * sum(tree.noise_scales())
        assert tree.uniform_error_bound(1e-6) <= limit, "with certainty, whatever is asked"


def test_a_release_with_a_heavier_noise_would_break_the_bound() -> None:
    """Power of the test above: noise 60 times as large as the split says is found by the adversary."""
    keys, weights = context(60, 2)
    truth, half = true_sum(keys, weights, 2), 2**-0.25
    tree = DPTreeSoftmax.init(keys, weights, bins=8, epsilon=2.0, delta=1e-5, entropy=SeededEntropy(0))
    worst, _ = attack(lambda y: 60 * (tree.query(y / half)[..., 0] - truth(y)), 2, 1.0)
    assert worst > tree.uniform_error_bound(1e-6)


@pytest.mark.slow
def test_median_of_copies_against_an_adaptive_adversary() -> None:
    """The paper's construction, with its net and its number of copies; and one release of the same budget, which is better."""
    d, beta, width = 1, 1e-2, 0.25
    keys, weights = context(60, d)
    truth = true_sum(keys, weights, 2)
    net = net_size(1.0, width, d)
    copies = copies_for(net, beta)
    assert net * math.exp(-copies / 8) <= beta < net * math.exp(-(copies - 2) / 8)
    source = SeededEntropy(1)

    def build(epsilon: float, delta: float) -> DPTreeSoftmax:
        return DPTreeSoftmax.init(keys, weights, bins=2, epsilon=epsilon, delta=delta, entropy=source)

    median = MedianOfCopies.init(build, copies=copies, epsilon=2.0, delta=1e-5)
    one = median.copies[0]
    assert isinstance(one, DPTreeSoftmax)
    within = one.error_bound(0.25)
    between = width * one.lipschitz_bound(beta / copies)
    worst, plain = attack(lambda y: median.query(y)[..., 0] - truth(y), d, 1.0)
    assert worst <= within + between
    assert worst <= within, "what the net promises at its points holds between them as well"
    single = build(2.0, 1e-5)
    single_worst, _ = attack(lambda y: single.query(y)[..., 0] - truth(y), d, 1.0)
    assert single_worst <= single.uniform_error_bound(beta) < within
    assert worst > plain * 0.9


def test_median_gains_where_copies_fail_at_times() -> None:
    """With a quarter of the answers far off, a median of `copies_for` copies is right everywhere, one copy is not."""

    class Sometimes:
        def __init__(self, seed: int) -> None:
            self.rng = np.random.default_rng(seed)

        def query(self, y: torch.Tensor) -> torch.Tensor:
            far = torch.from_numpy(self.rng.random(y.shape) < 0.25)
            return torch.where(far, 99.0, 1.0)

    y = torch.zeros(10_000)
    copies = copies_for(10_000, 1e-3)
    assert bool((MedianOfCopies([Sometimes(i) for i in range(copies)]).query(y) == 1).all())
    assert not bool((MedianOfCopies([Sometimes(i) for i in range(5)]).query(y) == 1).all())
    for count in (0, 2):
        with pytest.raises(ConfigError):
            MedianOfCopies.init(lambda e, d: Sometimes(0), copies=count, epsilon=1.0, delta=1e-5)
    with pytest.raises(ConfigError):
        MedianOfCopies([])


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_kernel_sums_against_an_adaptive_adversary(degree: int) -> None:
    """The sums that numerators and normaliser are read from; the uniform Gaussian bound."""
    n, d, dv, beta = 60, 4, 2, 1e-6
    gen = torch.Generator().manual_seed(1)
    key, value = torch.randn(1, n, d, generator=gen), torch.rand(1, n, dv, generator=gen)
    prepared = prepare_release(
        DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=2.0, degree=degree),
        [LayerSpec("a", 1, d, dv, d**-0.5)],
    )
    assert isinstance(prepared, kernel_sum.PreparedKernelSum)
    encoder = prepared.encoders[0]
    exact = (
        kernel_sum.sum_rows([encoder], [key], [value], prepared.bound)[0].double() * 2.0**-prepared.exponent
    )
    truth = kernel_sum.layer_structure(encoder, exact, n, 0.1)
    radius = float(encoder.geometry.query_radius[0])
    bound = gaussian_uniform_bound(
        prepared.sigma, encoder.features.size, encoder.features.key_norm_bound(radius), beta
    )
    found = []
    for seed in range(3):
        noised = prepared.run(LayerRows([key], [value]), entropy=SeededEntropy(seed)).structures[0]
        assert isinstance(noised, kernel_sum.KernelSumStructure)
        difference = noised.sums - truth.sums

        def error(y: torch.Tensor, difference: torch.Tensor = difference) -> torch.Tensor:
            sums = truth.features.query_sums(y.mT.float()[None, None], truth.table, difference)
            return sums[0, 0, 0].double()

        worst, plain = attack(error, d, radius, seed)
        assert plain * 0.98 <= worst <= bound
        found.append(worst)
    assert 20 * max(found) > bound  # power: 20 times the noise would break it
