"""Exact laws of the discrete noise, the statistics that compare samples with them, and a naive twin of the samplers."""

from __future__ import annotations

import math
import random
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from scipy import stats

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
