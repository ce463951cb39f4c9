"""The discrete samplers: exactness of every decision, and the distribution that comes out.

Statistical tests run a battery (`p_values`) and fail below `ALPHA` = 1e-8 for any of its 7 statistics.
KS uses the Dvoretzky-Kiefer-Wolfowitz-Massart bound, which holds for finite samples and discrete laws; the
chi-squares are asymptotic with at least 100 expected in each bin, hence the factor 14 left between
7 * ALPHA and the promised false-alarm rate of 1e-6 for each test. Tests with a seeded source are
deterministic. The same battery has to catch every planted defect (`test_battery_catches`).
"""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from hf_dp_xattn.privacy import bernoulli, bits, noise
from hf_dp_xattn.privacy.noise import (
    SeededEntropy,
    discrete_gaussian,
    discrete_geometric,
    discrete_laplace,
)

from .laws import (
    ALPHA,
    GAUSSIANS,
    LAPLACES,
    Law,
    N,
    accepted,
    chi_square,
    naive_gaussian,
    naive_laplace,
    p_values,
    two_sample,
)

# --- distribution ---------------------------------------------------------------------------------


@pytest.mark.parametrize("s2", GAUSSIANS, ids=str)
def test_gaussian_law(s2):
    z = discrete_gaussian(N, s2, entropy=SeededEntropy(11))
    p = p_values(z, Law("gaussian", s2))
    assert min(p.values()) >= ALPHA, p


@pytest.mark.parametrize("scale", LAPLACES, ids=str)
def test_laplace_law(scale):
    z = discrete_laplace(N, scale, entropy=SeededEntropy(12))
    p = p_values(z, Law("laplace", scale))
    assert min(p.values()) >= ALPHA, p


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(7, 3), 40], ids=str)
def test_geometric_gives_the_two_sided_law_by_difference(scale):
    g = discrete_geometric((2, N), scale, entropy=SeededEntropy(13))
    assert g.min() == 0
    p = p_values(g[0] - g[1], Law("laplace", scale))
    assert min(p.values()) >= ALPHA, p
    k = np.arange(math.ceil(3 * scale))
    q = math.exp(-1 / scale)
    seen = np.bincount(np.minimum(g[0], k.size), minlength=k.size + 1)
    assert chi_square(seen, np.append((1 - q) * q**k, q**k.size)) >= ALPHA


def test_laws_with_the_entropy_of_the_system():
    assert accepted(discrete_gaussian(N, Fraction(10, 3)), Law("gaussian", Fraction(10, 3)))
    assert accepted(discrete_laplace(N, Fraction(7, 3)), Law("laplace", Fraction(7, 3)))


def test_samples_are_independent_of_their_place():
    z = discrete_gaussian(N, 100, entropy=SeededEntropy(14)).astype(np.float64)

    def places(z):  # each is standard normal for i.i.d. samples
        z, m = z / z.std(), z * z / (z * z).mean() - 1
        m /= m.std()
        ramp = np.linspace(-math.sqrt(3), math.sqrt(3), z.size)
        series = [(z[k:] * z[:-k]).sum() for k in (1, 2, 65536)]
        series += [(m[1:] * m[:-1]).sum(), (ramp * z).sum(), (ramp * m).sum()]
        return np.abs(series).max() / math.sqrt(z.size)

    limit = stats.norm.isf(ALPHA / 2)
    assert places(z) < limit
    assert places(np.repeat(z[: N // 2], 2)) > limit
    assert places(np.tile(z[:65536], 6)) > limit
    assert places(z[np.argsort(np.abs(z) + 400 * np.random.default_rng(0).random(N))]) > limit


@pytest.mark.parametrize("s2", [Fraction(1, 4), Fraction(10, 3), 25], ids=str)
def test_gaussian_matches_the_naive_twin(s2):
    rng = random.Random(1)
    slow = np.array([naive_gaussian(Fraction(s2), rng) for _ in range(10_000)])
    assert accepted(slow, Law("gaussian", s2))
    assert two_sample(slow, discrete_gaussian(N, s2, entropy=SeededEntropy(15))) >= ALPHA


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(7, 3), 10], ids=str)
def test_laplace_matches_the_naive_twin(scale):
    rng = random.Random(2)
    slow = np.array([naive_laplace(Fraction(scale), rng) for _ in range(20_000)])
    assert accepted(slow, Law("laplace", scale))
    assert two_sample(slow, discrete_laplace(N, scale, entropy=SeededEntropy(16))) >= ALPHA


@pytest.mark.parametrize("scale", [0.75, 4.0])
@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_matches_opendp(kind, scale):
    """OpenDP samples the same laws for integer vectors, with its own entropy (unseeded)."""
    dp = pytest.importorskip("opendp.prelude")
    dp.enable_features("contrib")
    domain = dp.vector_domain(dp.atom_domain(T="i64"))
    n = 80_000
    if kind == "gaussian":
        theirs = dp.m.make_gaussian(domain, dp.l2_distance(T="f64"), scale=scale)([0] * n)
        ours = discrete_gaussian(N, Fraction(scale) ** 2, entropy=SeededEntropy(17))
        off = discrete_gaussian(N, (Fraction(scale) * Fraction(105, 100)) ** 2, entropy=SeededEntropy(17))
    else:
        theirs = dp.m.make_laplace(domain, dp.l1_distance(T="i64"), scale=scale)([0] * n)
        ours = discrete_laplace(N, Fraction(scale), entropy=SeededEntropy(17))
        off = discrete_laplace(N, Fraction(scale) * Fraction(105, 100), entropy=SeededEntropy(17))
    theirs = np.array(theirs)
    assert two_sample(theirs, ours) >= ALPHA
    assert two_sample(theirs, off) < ALPHA
    assert accepted(theirs, Law(kind, Fraction(scale) ** (2 if kind == "gaussian" else 1)))


# --- planted defects: the battery has power -------------------------------------------------------


def _scale_off(kind):
    if kind == "gaussian":
        return discrete_gaussian(N, Fraction(100 * 10609, 10000), entropy=SeededEntropy(21)), Law(kind, 100)
    return discrete_laplace(N, Fraction(1030, 100), entropy=SeededEntropy(21)), Law(kind, 10)


def _rounded(sigma, kind="gaussian"):
    rng = np.random.default_rng(22)
    x = rng.normal(0, sigma, N) if kind == "gaussian" else rng.laplace(0, sigma, N)
    return np.rint(x).astype(np.int64), Law(kind, Fraction(sigma) ** (2 if kind == "gaussian" else 1))


def _truncated():
    z = discrete_gaussian(N, 100, entropy=SeededEntropy(23))
    return z[np.abs(z) <= 30], Law("gaussian", 100)


def _laplace_for_gaussian():
    return discrete_laplace(N, Fraction(10 * 7071, 10000), entropy=SeededEntropy(24)), Law("gaussian", 100)


def _sign_bias():
    z = discrete_gaussian(N, 2**70, entropy=SeededEntropy(25))
    flip = np.random.default_rng(0).random(N) < 0.02
    return np.where(flip, np.abs(z), z), Law("gaussian", 2**70)


def _even():
    return discrete_gaussian(N, 2**60, entropy=SeededEntropy(26)) & ~1, Law("gaussian", 2**60)


def _float32_noise():
    x = np.random.default_rng(27).standard_normal(N, dtype=np.float32) * np.float32(2**30)
    return np.rint(x).astype(np.int64), Law("gaussian", 2**60)


def _shifted():
    return discrete_gaussian(N, 2, entropy=SeededEntropy(28)) + (np.arange(N) % 64 == 0), Law("gaussian", 2)


DEFECTS = {
    "Gaussian scale off by 3 %": lambda: _scale_off("gaussian"),
    "Laplace scale off by 3 %": lambda: _scale_off("laplace"),
    "rounded Gaussian, sigma 0.5": lambda: _rounded(0.5),
    "rounded Gaussian, sigma 1": lambda: _rounded(1.0),
    "rounded Laplace, scale 2": lambda: _rounded(2.0, "laplace"),
    "tail cut at 3 sigma": _truncated,
    "Laplace in place of Gaussian": _laplace_for_gaussian,
    "2 % of signs biased": _sign_bias,
    "even only": _even,
    "float32 low bits": _float32_noise,
    "one sample in 64 shifted": _shifted,
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_battery_catches(defect):
    z, law = DEFECTS[defect]()
    assert not accepted(z, law)


def test_battery_catches_a_kept_negative_zero(monkeypatch):
    def signed(draws, k, tau):
        magnitude = noise.geometric_block(draws, k, tau)
        return magnitude * (1 - 2 * bits.coin_flips(draws.entropy, k).astype(np.int64))

    monkeypatch.setattr(noise, "_signed", signed)
    for s2 in (1, 100):
        assert not accepted(discrete_gaussian(N, s2, entropy=SeededEntropy(31)), Law("gaussian", s2))
    for scale in (1, 10):
        assert not accepted(discrete_laplace(N, scale, entropy=SeededEntropy(31)), Law("laplace", scale))


@pytest.mark.parametrize("s2", [Fraction(10, 3), 2**60], ids=str)
def test_battery_catches_a_wrong_acceptance(monkeypatch, s2):
    exact = bernoulli.BernoulliExp.draw
    monkeypatch.setattr(bernoulli.BernoulliExp, "draw", lambda self, x, e: exact(self, 0.95 * x, e))
    assert not accepted(discrete_gaussian(N, s2, entropy=SeededEntropy(32)), Law("gaussian", s2))


@pytest.mark.parametrize("s2", [Fraction(10, 3), 2**60], ids=str)
def test_battery_catches_a_wrong_geometric(monkeypatch, s2):
    right = bernoulli.BernoulliExp.geometric
    monkeypatch.setattr(
        bernoulli.BernoulliExp, "geometric", lambda self, n, r: np.minimum(right(self, n, r), 3)
    )
    assert not accepted(discrete_gaussian(N, s2, entropy=SeededEntropy(33)), Law("gaussian", s2))


@pytest.mark.slow
@pytest.mark.parametrize("s2", [Fraction(1, 4), Fraction(10, 3), 2**60], ids=str)
def test_gaussian_law_with_many_samples(s2):
    """2 * 10^7 samples: a relative error of 0.5 % in sigma, or of 10^-3 in a large bin, would show."""
    n = 20_000_000
    law = Law("gaussian", s2)
    assert accepted(discrete_gaussian(n, s2, entropy=SeededEntropy(81)), law)
    assert not accepted(discrete_gaussian(n, s2 * Fraction(101, 100), entropy=SeededEntropy(82)), law)
