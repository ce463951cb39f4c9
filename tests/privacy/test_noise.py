"""The discrete samplers: exactness of every decision, and the distribution that comes out.

Statistical tests run a battery (`p_values`) and fail below `ALPHA` = 1e-8 for any of its 7 statistics.
KS uses the Dvoretzky-Kiefer-Wolfowitz-Massart bound, which holds for finite samples and discrete laws; the
chi-squares are asymptotic with at least 100 expected in each bin, hence the factor 14 left between
7 * ALPHA and the promised false-alarm rate of 1e-6 for each test. Tests with a seeded source are
deterministic. The same battery has to catch every planted defect (`test_battery_catches`).
"""

from __future__ import annotations

import math
import os
import random
import time
import tracemalloc
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_dp_xattn.errors import ConfigError, DPXAttnError
from hf_dp_xattn.privacy import bernoulli, bits, noise
from hf_dp_xattn.privacy.noise import (
    SeededEntropy,
    SystemEntropy,
    discrete_gaussian,
    discrete_geometric,
    discrete_laplace,
)

ALPHA = 1e-8
N = 400_000
GAUSSIANS = [Fraction(1, 4), Fraction(1), Fraction(10, 3), Fraction(729, 4), 10**6 + 1, 2**61 + 12345, 2**80]
LAPLACES = [Fraction(1, 2), Fraction(1), Fraction(7, 3), Fraction(22, 7), 50, Fraction(10**9, 7), 2**40]

# --- the naive twin: algorithms 1 to 3 of Canonne, Kamath, Steinke, one sample at a time ----------


def naive_bernoulli(p: Fraction, rng: random.Random) -> bool:
    return rng.randrange(p.denominator) < p.numerator


def naive_bernoulli_exp(gamma: Fraction, rng: random.Random) -> bool:
    if gamma <= 1:
        k = 1
        while naive_bernoulli(gamma / k, rng):
            k += 1
        return k % 2 == 1
    for _ in range(math.floor(gamma)):
        if not naive_bernoulli_exp(Fraction(1), rng):
            return False
    return naive_bernoulli_exp(gamma - math.floor(gamma), rng)


def naive_laplace(scale: Fraction, rng: random.Random) -> int:
    t, s = scale.numerator, scale.denominator
    while True:
        u = rng.randrange(t)
        if not naive_bernoulli_exp(Fraction(u, t), rng):
            continue
        v = 0
        while naive_bernoulli_exp(Fraction(1), rng):
            v += 1
        y = (u + t * v) // s
        negative = naive_bernoulli(Fraction(1, 2), rng)
        if negative and y == 0:
            continue
        return -y if negative else y


def naive_gaussian(s2: Fraction, rng: random.Random) -> int:
    t = math.isqrt(math.floor(s2)) + 1
    while True:
        y = naive_laplace(Fraction(t), rng)
        if naive_bernoulli_exp((abs(y) - s2 / t) ** 2 / (2 * s2), rng):
            return y


# --- the laws -------------------------------------------------------------------------------------


class Law:
    """Distribution function of an integer law; `table` is its pmf by decimals, where the scale is small."""

    def __init__(self, kind: str, parameter: int | Fraction) -> None:
        self.kind, self.parameter = kind, Fraction(parameter)
        self.spread = math.sqrt(self.parameter) if kind == "gaussian" else float(self.parameter)
        self.table: np.ndarray | None = None
        if self.spread <= 60:
            self.reach = math.ceil(13 * self.spread if kind == "gaussian" else 45 * self.spread) + 2
            self.table = self._table()
            self.cumulative = np.cumsum(self.table)

    def _table(self) -> np.ndarray:
        with localcontext() as ctx:
            ctx.prec = 40
            weights = []
            for z in range(self.reach + 1):
                gaussian = self.kind == "gaussian"
                x = Fraction(z * z) / (2 * self.parameter) if gaussian else z / self.parameter
                weights.append((-Decimal(x.numerator) / Decimal(x.denominator)).exp())
            total = 2 * sum(weights) - weights[0]
            half = [float(w / total) for w in weights]
        return np.array(half[:0:-1] + half)

    def cdf(self, z: np.ndarray) -> np.ndarray:
        z = np.asarray(z, dtype=np.float64)
        if self.table is not None:
            index = np.clip(z + self.reach, -1, 2 * self.reach).astype(np.int64)
            return np.where(index < 0, 0.0, self.cumulative[index])
        if self.kind == "gaussian":  # Euler-Maclaurin: the error is below 0.02 / sigma^2 < 6e-6
            return stats.norm.cdf((z + 0.5) / self.spread)
        q = math.exp(-1 / self.spread)
        upper = np.exp(-(np.abs(z) + np.where(z >= 0, 1, 0)) / self.spread) / (1 + q)
        return np.where(z >= 0, 1 - upper, upper)

    def residues(self, modulus: int) -> np.ndarray:
        if self.table is None:  # uniform up to (modulus / spread)^2
            return np.full(modulus, 1 / modulus)
        z = np.arange(-self.reach, self.reach + 1) % modulus
        return np.bincount(z, weights=self.table, minlength=modulus)


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of observed counts; bins with fewer than 100 expected are put together first."""
    n = observed.sum()
    thin = n * probabilities < 100
    observed = np.append(observed[~thin], observed[thin].sum())
    expected = n * np.append(probabilities[~thin], probabilities[thin].sum())
    if expected[-1] < 100:
        observed, expected = observed[:-1], expected[:-1]
        rest, rest_expected = n - observed.sum(), n - expected.sum()
        k = int(np.argmax(expected))
        observed[k] += rest
        expected[k] += rest_expected
    if observed.size < 2:
        return 1.0
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), observed.size - 1))


def p_values(z: np.ndarray, law: Law) -> dict[str, float]:
    """The battery. Each statistic is compared with ALPHA."""
    n = z.size
    out = {}
    values, counts = np.unique(z, return_counts=True)
    empirical = np.cumsum(counts) / n
    gap = max(
        np.abs(empirical - law.cdf(values)).max(),
        np.abs(empirical - counts / n - law.cdf(values - 1)).max(),
    )
    out["ks"] = min(1.0, 2 * math.exp(-2 * n * gap * gap))

    levels = np.concatenate([[0.0005, 0.002, 0.005], np.linspace(0.02, 0.98, 49), [0.995, 0.998, 0.9995]])
    edges = np.unique(values[np.searchsorted(law.cdf(values), levels).clip(0, values.size - 1)])
    upto = np.concatenate([[0.0], law.cdf(edges), [1.0]])
    seen = np.concatenate([[0], np.searchsorted(np.sort(z), edges, side="right"), [n]])
    out["chi2"] = chi_square(np.diff(seen), np.diff(upto))

    below, upto0 = law.cdf(np.array([-1, 0]))
    signs = np.array([(z < 0).sum(), (z == 0).sum(), (z > 0).sum()])
    out["signs"] = chi_square(signs, np.array([below, upto0 - below, 1 - upto0]))
    out["sides"] = float(stats.binomtest(int(signs[2]), int(signs[0] + signs[2])).pvalue)
    for modulus in (2, 3, 16):
        out[f"mod{modulus}"] = chi_square(np.bincount(z % modulus, minlength=modulus), law.residues(modulus))
    return out


def accepted(z: np.ndarray, law: Law) -> bool:
    return min(p_values(z, law).values()) >= ALPHA


def two_sample(a: np.ndarray, b: np.ndarray) -> float:
    """p-value of the chi-square homogeneity test, with bins of at least 100 pooled."""
    values, inverse = np.unique(np.concatenate([a, b]), return_inverse=True)
    pooled = np.bincount(inverse)
    group = np.minimum(np.cumsum(pooled) // 200, (a.size + b.size) // 200 - 1)
    group = np.unique(group, return_inverse=True)[1][inverse]
    table = np.stack([np.bincount(group[: a.size], minlength=group.max() + 1), np.bincount(group[a.size :])])
    assert values.size > 2
    return float(stats.chi2_contingency(table).pvalue)


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


# --- exactness of every decision ------------------------------------------------------------------


def exp_neg(x: Fraction, digits: int) -> Fraction:
    """exp(-x) with a relative error below 10^-digits, by the decimal module (an independent route)."""
    with localcontext() as ctx:
        ctx.prec = digits + 20
        ctx.Emin, ctx.Emax = -(10**12), 10**12
        return Fraction((-Decimal(x.numerator) / Decimal(x.denominator)).exp())


rationals = st.one_of(
    st.fractions(0, 70),
    st.builds(lambda a, b: Fraction(a, b), st.integers(0, 2**90), st.integers(2**84, 2**90)),
    st.builds(lambda a, b: Fraction(a, 1 << b), st.integers(1, 50), st.integers(0, 200)),
)


@given(rationals, st.sampled_from([8, 32, 53, 96, 200]))
@settings(max_examples=300, deadline=None)
def test_exp_bounds_contain_the_value(x, precision):
    lo, hi = bernoulli.exp_neg_bounds(x, precision)
    true = exp_neg(x, 120)
    assert 0 <= lo <= hi <= lo + 2
    slack = Fraction(1, 10**100) if x else 0
    assert lo <= true * 2**precision * (1 + slack)
    assert hi >= true * 2**precision * (1 - slack)


def test_exp_bounds_of_zero_large_and_negative():
    assert bernoulli.exp_neg_bounds(Fraction(0), 32) == (2**32, 2**32)
    lo, hi = bernoulli.exp_neg_bounds(Fraction(2**100, 3), 64)
    assert lo == 0 and 1 <= hi <= 2
    with pytest.raises(ValueError):
        bernoulli.exp_neg_bounds(Fraction(-1, 2), 32)


def test_exp_of_numpy_is_far_within_the_assumed_error():
    """Assumed: 2^-48 relative. Found everywhere: under 2^-50, at every array length, remainder and stride."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(0, 64, 6000), rng.exponential(1, 6000), 2.0 ** -rng.uniform(0, 60, 2000)])
    whole = np.exp(-x)
    for got, at in zip(whole.tolist(), x.tolist(), strict=True):
        true = exp_neg(Fraction(at), 30)
        assert abs(Fraction(got) - true) <= true * Fraction(1, 2**50)
    for n in range(1, 40):
        assert np.all(np.abs(np.exp(-x[:n]) - whole[:n]) <= 2.0**-50 * whole[:n])
        assert np.all(np.abs(np.exp(-x[: 5 * n : 5]) - whole[: 5 * n : 5]) <= 2.0**-50 * whole[: 5 * n : 5])


class Checked(bernoulli.BernoulliExp):
    """Checks the promise that callers of `draw` make, and that the estimate s is within GUARD / 3."""

    checked = 0

    def draw(self, x, exact):
        for i in range(0, x.size, max(1, x.size // 12)):
            self.checked += 1
            true, stand_in = exact(i), Fraction(float(x[i]))
            if true <= 64:
                assert abs(stand_in - true) <= Fraction(1, 2**42)
            else:
                assert stand_in > 63
            s = Fraction(float(np.exp(-x)[i])) * 2**32
            ideal = exp_neg(true, 40) * 2**32 if true <= 100 else 0  # 2^32 exp(-100) < 2^-112
            assert abs(s - ideal) <= Fraction(bernoulli.GUARD) / 3
        return super().draw(x, exact)


fraction_of_size = st.builds(
    lambda a, b, e: min(max(Fraction(a, b) * Fraction(2) ** e, Fraction(1, 16)), Fraction(2**80)),
    st.integers(1, 2**70),
    st.integers(1, 2**70),
    st.integers(-10, 85),
)


@given(fraction_of_size, st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_float_estimates_keep_their_error_bound(value, seed):
    draws = Checked(SeededEntropy(seed))
    assert noise.gaussian_block(draws, 20, value).size == 20
    assert draws.checked
    tau = min(max(value, noise.MIN_SCALE), noise.MAX_SCALE)
    assert noise.laplace_block(draws, 20, tau).size == 20


def test_float_estimates_in_the_far_tail():
    """Candidates that the sampler itself would hardly ever draw, up to the largest possible."""
    for s2 in (Fraction(1, 16), Fraction(10, 3), Fraction(10**9, 7), Fraction(2**80)):
        t = math.isqrt(math.floor(s2)) + 1
        centre_f, weight_f = float(s2 / t), float(1 / (2 * s2))
        for k in [*range(40), 200, 2000]:
            y = k * t + k % 3
            a = np.abs(np.array([y])) - centre_f
            true = (y - s2 / t) ** 2 / (2 * s2)
            Checked(SeededEntropy(1)).draw(a * a * weight_f, lambda i, true=true: true)
    assert (2900 * (2**40 + 1)) < 2**52


class Script:
    """An entropy source that plays given bytes, and fails when they are used up."""

    private = False

    def __init__(self, data: bytes) -> None:
        self.data, self.used = data, 0

    def random_bytes(self, n: int) -> bytes:
        assert self.used + n <= len(self.data), "more bits than expected"
        self.used += n
        return self.data[self.used - n : self.used]


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


@given(rationals, st.integers(-2, 2), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
@settings(max_examples=300, deadline=None)
def test_draws_next_to_the_threshold_are_decided_exactly(x, offset, more, last):
    """u's first 32 bits at the threshold and up to 2 units off it: the outcome is that of real numbers."""
    threshold = math.floor(exp_neg(x, 60) * 2**32)
    first = min(max(threshold + offset, 0), 2**32 - 1)
    source = Script(word(first) + more.to_bytes(8, "little") + last.to_bytes(8, "little"))
    draws = bernoulli.BernoulliExp(source)
    got = bool(draws.draw(np.array([float(x)]), lambda i: x)[0])
    u = Fraction((first << 128) | (more << 64) | last, 1 << 160)
    assert got == (u < exp_neg(x, 120))
    if offset == 0 and x > 0:
        assert draws.settled == 1
    if abs(offset) == 2 and x > 0 and 4 < threshold < 2**32 - 4:
        assert draws.settled == 0 and source.used == 4


@given(st.fractions(1, 8), st.integers(1, 12), st.integers(-2, 2), st.integers(0, 2**64 - 1))
@settings(max_examples=200, deadline=None)
def test_geometric_next_to_its_thresholds_is_decided_exactly(rate, k, offset, more):
    first = min(max(math.floor(exp_neg(k * rate, 60) * 2**32) + offset, 0), 2**32 - 1)
    source = Script(word(first) + (more | 1 << 40).to_bytes(8, "little") + b"\1" * 32)
    draws = bernoulli.BernoulliExp(source)
    got = int(draws.geometric(1, rate)[0])
    u = Fraction((first << 64) | (more | 1 << 40), 1 << 96)
    expected = 0
    while u < exp_neg((expected + 1) * rate, 120):
        expected += 1
    assert got == expected
    assert draws.settled == (1 if offset == 0 or first == 0 else draws.settled)


def test_geometric_thresholds_are_floors():
    for rate in (Fraction(1), Fraction(8), Fraction(9, 7), Fraction(1, 4), 1 + Fraction(1, 2**60)):
        thresholds = bernoulli.geometric_thresholds(rate)
        assert thresholds[-1] == 0 and 0 not in thresholds[:-1] and len(thresholds) < 200
        for k, threshold in enumerate(thresholds, start=1):
            assert threshold == math.floor(exp_neg(k * rate, 60) * 2**32)
    with pytest.raises(ValueError):
        bernoulli.geometric_thresholds(Fraction(1, 5))


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
@pytest.mark.parametrize("parameter", [Fraction(10, 3), 2**30], ids=str)
def test_exact_path_has_the_same_law(kind, parameter):
    """With the undecided band widened to 2^-5 of the range, some 5 % of all draws go the exact way."""
    draws = bernoulli.BernoulliExp(SeededEntropy(41), guard=2.0**26)
    block = noise.gaussian_block if kind == "gaussian" else noise.laplace_block
    n = 30_000
    z = block(draws, n, Fraction(parameter))
    assert draws.settled > 0.02 * n
    p = p_values(z, Law(kind, parameter))
    assert min(p.values()) >= ALPHA, p


@pytest.mark.parametrize("wrong", ["always", "never"])
def test_a_wrong_exact_path_is_caught(monkeypatch, wrong):
    """The exact path carries enough of the draws above for its errors to show."""

    def below(self, x):
        return wrong == "always" and x < 20

    monkeypatch.setattr(bernoulli.LazyUniform, "below_exp_neg", below)
    draws = bernoulli.BernoulliExp(SeededEntropy(42), guard=2.0**26)
    assert not accepted(
        noise.gaussian_block(draws, 30_000, Fraction(10, 3)), Law("gaussian", Fraction(10, 3))
    )


def test_the_guard_cannot_be_narrowed():
    for guard in (0.0, bernoulli.GUARD / 2, math.nan):
        with pytest.raises(ValueError):
            bernoulli.BernoulliExp(SeededEntropy(0), guard=guard)


@pytest.mark.parametrize("bound", [2, 3, 12, 1000, 2**16, 2**16 + 1, 3 * 2**40, 2**48])
def test_uniform_integers(bound):
    u = bits.uniform_below(SeededEntropy(51), N, bound)
    assert u.min() >= 0 and u.max() < bound and u.dtype == np.int64
    bins = min(bound, 48)
    edges = [-(-bound * k // bins) for k in range(bins + 1)]
    seen = np.histogram(u, bins=[e - 0.5 for e in edges])[0]
    assert chi_square(seen, np.diff(edges) / bound) >= ALPHA
    for modulus in (2, 3):
        if bound % modulus == 0:
            assert chi_square(np.bincount(u % modulus), np.full(modulus, 1 / modulus)) >= ALPHA


@pytest.mark.parametrize(("bound", "size"), [(3, 4), (1000, 4), (2**16 + 1, 8), (3 * 2**40, 8)])
def test_uniform_integers_reject_the_incomplete_last_run(bound, size):
    full = (2 ** (8 * size) // bound) * bound
    assert full < 2 ** (8 * size)  # so modulo without rejection would be biased
    for rejected in (full, 2 ** (8 * size) - 1):
        source = Script(rejected.to_bytes(size, "little") + (full - 1).to_bytes(size, "little"))
        assert bits.uniform_below(source, 1, bound).tolist() == [bound - 1]
        assert source.used == 2 * size
    source = Script(b"".join(v.to_bytes(size, "little") for v in (bound, full, bound + 1, full - bound)))
    assert bits.uniform_below(source, 3, bound).tolist() == [0, 1, 0]


def test_uniform_integers_refuse_bad_bounds():
    assert bits.uniform_below(Script(b""), 3, 1).tolist() == [0, 0, 0]
    for bound in (0, -1, 2**48 + 1):
        with pytest.raises(ConfigError):
            bits.uniform_below(SeededEntropy(0), 1, bound)


def test_sampling_distance_is_zero():
    assert noise.sampling_distance() == noise.SAMPLING_DISTANCE == 0.0


# --- entropy --------------------------------------------------------------------------------------


def test_system_entropy_is_the_only_randomness(monkeypatch):
    """The output is a function of the bytes of os.urandom, and of nothing else."""
    asked = []

    def fake(seed):
        source = SeededEntropy(seed)

        def urandom(n):
            asked.append(n)
            return source.random_bytes(n)

        return urandom

    results = []
    for seed, global_seed in ((61, 1), (61, 2), (62, 1)):
        np.random.seed(global_seed)
        random.seed(global_seed)
        monkeypatch.setattr(os, "urandom", fake(seed))
        results.append(np.stack([discrete_gaussian(5000, 2**40), discrete_laplace(5000, 2**20)]))
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    # At scale 2^20 and with i.i.d. samples, fewer bytes than this could not carry the entropy of the output.
    assert sum(asked) / 3 > 2 * 5000 * 21 / 8


@pytest.mark.parametrize("error", [OSError("no entropy"), NotImplementedError("no entropy")])
def test_failing_system_entropy_fails_the_sampler(monkeypatch, error):
    def urandom(n):
        raise error

    monkeypatch.setattr(os, "urandom", urandom)
    with pytest.raises(type(error)):
        discrete_gaussian(10, 100)
    with pytest.raises(type(error)):
        discrete_laplace(10, Fraction(1, 2))


def test_short_reads_fail(monkeypatch):
    class Short:
        private = True

        def random_bytes(self, n):
            return bytes(max(n - 1, 0))

    with pytest.raises(DPXAttnError, match="bytes"):
        discrete_gaussian(10, 100, entropy=Short())
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n - 1))
    with pytest.raises(DPXAttnError, match="bytes"):
        discrete_gaussian(10, 100)


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
@pytest.mark.parametrize("scale", [Fraction(1, 2), 5, 8])
def test_stuck_sources_fail_rather_than_give_no_noise(byte, scale):
    class Stuck:
        private = True

        def random_bytes(self, n):
            return byte * n

    with pytest.raises(DPXAttnError, match="random"):
        discrete_laplace(3, scale, entropy=Stuck())


def test_large_reads_come_in_parts(monkeypatch):
    sizes = []
    real = os.urandom

    def urandom(n):
        sizes.append(n)
        return real(n)

    monkeypatch.setattr(os, "urandom", urandom)
    assert len(SystemEntropy().random_bytes((1 << 24) + 5)) == (1 << 24) + 5
    assert sizes == [1 << 24, 5]
    assert SystemEntropy().random_bytes(0) == b""


def test_private_flags_and_repr():
    assert SystemEntropy().private is True
    assert SeededEntropy(123456).private is False
    assert "123456" not in repr(SeededEntropy(123456))
    with pytest.raises(AttributeError):
        SeededEntropy(1).private = True
    for seed in (-1, 1.5, True, "1", None):
        with pytest.raises(ConfigError):
            SeededEntropy(seed)


def test_seeded_is_reproducible_and_system_is_not():
    a, b = (discrete_gaussian((7, 50), 2**50, entropy=SeededEntropy(5)) for _ in range(2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, discrete_gaussian((7, 50), 2**50, entropy=SeededEntropy(6)))
    source = SeededEntropy(5)
    first, second = (discrete_gaussian((7, 50), 2**50, entropy=source) for _ in range(2))
    assert np.array_equal(first, a) and not np.array_equal(first, second)
    assert not np.array_equal(discrete_gaussian(350, 2**50), discrete_gaussian(350, 2**50))
    assert SeededEntropy(7).random_bytes(3) == SeededEntropy(7).random_bytes(11)[:3]


# --- the interface --------------------------------------------------------------------------------

SAMPLERS = [discrete_gaussian, discrete_laplace, discrete_geometric]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_shapes_and_types(sampler):
    for shape, expected in [
        (5, (5,)),
        ((), ()),
        ((0,), (0,)),
        (0, (0,)),
        ((3, 4), (3, 4)),
        (np.int64(2), (2,)),
    ]:
        z = sampler(shape, 4, entropy=SeededEntropy(1))
        assert isinstance(z, np.ndarray) and z.shape == expected and z.dtype == np.int64
        assert z.flags.writeable
    for parameter in (4, np.int32(4), Fraction(4), 4.0, np.float64(4.0)):
        z = sampler(1000, parameter, entropy=SeededEntropy(1))
        assert np.array_equal(z, sampler(1000, 4, entropy=SeededEntropy(1)))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [-1, (3, -1), 2.0, (2.0,), True, (True,), "3", None, [3]])
def test_bad_shapes(sampler, shape):
    with pytest.raises(ConfigError, match="shape"):
        sampler(shape, 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "value",
    [
        *(0, -1, 0.0, -0.0, Fraction(-1, 3), 1e-300, 5e-324, Fraction(1, 10**400), -(10**400)),
        *(math.nan, math.inf, -math.inf, 2**81, 1e300, 10**400, Fraction(10**500, 7)),
        *(True, np.bool_(True), "1", None, Decimal(4), np.float32(4), 4 + 0j, np.array(4)),
    ],
    ids=lambda v: f"{type(v).__name__}-{str(v)[:12]}",
)
def test_bad_parameters(monkeypatch, sampler, value):
    monkeypatch.setattr(os, "urandom", lambda n: pytest.fail("drew before it checked"))
    with pytest.raises(ConfigError, match=r"sigma_squared|scale") as caught:
        sampler(4, value)
    assert len(str(caught.value)) < 300


def test_limits_are_inclusive():
    assert discrete_gaussian(1000, noise.MAX_SIGMA_SQUARED).std() > 2**39
    assert np.abs(discrete_gaussian(100_000, noise.MIN_SIGMA_SQUARED, entropy=SeededEntropy(2))).max() == 1
    assert discrete_laplace(1000, noise.MAX_SCALE).std() > 2**39
    assert np.abs(discrete_laplace(100_000, noise.MIN_SCALE, entropy=SeededEntropy(2))).max() == 1
    for sampler, low, high in [
        (discrete_gaussian, noise.MIN_SIGMA_SQUARED, noise.MAX_SIGMA_SQUARED),
        (discrete_laplace, noise.MIN_SCALE, noise.MAX_SCALE),
    ]:
        with pytest.raises(ConfigError, match="finer"):
            sampler(1, low - Fraction(1, 10**30))
        with pytest.raises(ConfigError, match="coarser"):
            sampler(1, high + Fraction(1, 10**30))


@pytest.mark.parametrize("entropy", [SystemEntropy, 5, b"123", np.random.default_rng(0), random.Random(0)])
def test_bad_entropy(entropy):
    with pytest.raises(ConfigError, match="entropy"):
        discrete_gaussian(4, 4, entropy=entropy)


def test_long_fractions_are_exact_not_rounded_to_float():
    """A float keeps 53 bits; parameters of any length are used as they are."""
    s2 = Fraction(10**60 + 1, 3 * 10**59)
    z = discrete_gaussian(N, s2, entropy=SeededEntropy(71))
    assert accepted(z, Law("gaussian", s2))
    tau = Fraction(7 * 10**60 + 1, 3 * 10**60)
    assert accepted(discrete_laplace(N, tau, entropy=SeededEntropy(72)), Law("laplace", tau))


def test_memory_is_bounded():
    n = 2_000_000
    discrete_gaussian(10, 2**60)
    tracemalloc.start()
    try:
        z = discrete_gaussian(n, 2**60)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - z.nbytes < 16 * 2**20


@pytest.mark.slow
@pytest.mark.parametrize("s2", [Fraction(1, 4), 10, 2**20, 2**80], ids=str)
def test_a_million_samples_take_well_under_a_second(s2):
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        discrete_gaussian(10**6, s2)
        best = min(best, time.process_time() - start)
    assert best < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("s2", [Fraction(1, 4), Fraction(10, 3), 2**60], ids=str)
def test_gaussian_law_with_many_samples(s2):
    """2 * 10^7 samples: a relative error of 0.5 % in sigma, or of 10^-3 in a large bin, would show."""
    n = 20_000_000
    law = Law("gaussian", s2)
    assert accepted(discrete_gaussian(n, s2, entropy=SeededEntropy(81)), law)
    assert not accepted(discrete_gaussian(n, s2 * Fraction(101, 100), entropy=SeededEntropy(82)), law)
