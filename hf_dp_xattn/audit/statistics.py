r"""Exact confidence bounds on probabilities, and what they say about epsilon.

*Exact binomial bounds.* Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial"
(Biometrika 1934): a bound at error a is wrong with probability at most a, whatever the probability and the number of trials.

*From two probabilities to epsilon.* Let A be a set of outcomes, p <= P_x(A) and P_x'(A) <= q for neighbours x, x'. If a release is
(epsilon, delta)-DP then P_x(A) <= e^epsilon P_x'(A) + delta, so epsilon >= log((p - delta) / q): nothing is assumed of the release. If its
noise is Gaussian, its trade-off curve is that of N(0, 1) against N(mu, 1) with mu >= Phi^-1(p) - Phi^-1(q), and
epsilon is at least that of this pair at delta (Nasr et al., "Tight auditing of differentially private machine learning", arXiv
2302.07956): far more is seen with as many draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.float64]
_THRESHOLDS = 512
_CHOICE = 1e-6


def lower_bound(hits: npt.ArrayLike, trials: int, error: float) -> Array:
    """What the probability exceeds but with probability `error`; hits may be an array."""
    k = np.asarray(hits, dtype=np.float64)
    bound = special.betaincinv(np.maximum(k, 1.0), trials - k + 1.0, error)
    return np.asarray(np.where(k > 0, bound, 0.0))


def upper_bound(hits: npt.ArrayLike, trials: int, error: float) -> Array:
    """What the probability stays below but with probability `error`; hits may be an array."""
    k = np.asarray(hits, dtype=np.float64)
    bound = special.betainccinv(k + 1.0, np.maximum(trials - k, 1.0), error)
    return np.asarray(np.where(k < trials, bound, 1.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon at delta of N(0, 1) against N(mu, 1), rounded down; infinite at delta = 0.

    Balle and Wang, "Improving the Gaussian mechanism for differential privacy", arXiv 1805.06530, Theorem 8.
    """
    if mu <= 0:
        return 0.0
    if delta <= 0:
        return math.inf

    def excess(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(special.ndtr(a) - math.exp(min(700.0, epsilon + float(special.log_ndtr(b))))) - delta

    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def from_probabilities(p: Array, q: Array, delta: float) -> Array:
    """log((p - delta) / q), at least 0."""
    gain = np.maximum(p - delta, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.maximum(np.log(gain) - np.log(q), 0.0))


def from_gaussian(p: float, q: float, delta: float) -> float:
    """epsilon of the Gaussian pair with mu = Phi^-1(p) - Phi^-1(q)."""
    mu = float(special.ndtri(p)) - float(special.ndtri(q)) if p > 0 and q < 1 else 0.0
    return gaussian_epsilon(mu, delta)


@dataclass(frozen=True)
class Rule:
    """A distinguisher: "it was x" where sign * statistic >= threshold. sign = -1: x' takes the place of x."""

    threshold: float
    sign: float

    def counts(self, of_x: Array, of_other: Array) -> tuple[int, int]:
        """How often it says so under the law that it names, and under the other one."""
        named, other = (of_x, of_other) if self.sign > 0 else (of_other, of_x)
        return tuple(int((self.sign * s >= self.threshold).sum()) for s in (named, other))  # type: ignore[return-value]


def choose_rule(of_x: Array, of_other: Array, delta: float, *, gaussian: bool) -> Rule:
    """The rule that looks best on these draws; they must not be used again to judge it. Bounds at a small error keep it from rare events
    that happened to fall well."""
    best, chosen = -math.inf, Rule(0.0, 1.0)
    for sign in (1.0, -1.0):
        named, other = (of_x, of_other) if sign > 0 else (of_other, of_x)
        a, b = np.sort(sign * named), np.sort(sign * other)
        quantiles = np.linspace(0.0, 1.0, _THRESHOLDS)
        thresholds = np.unique(
            np.concatenate([np.quantile(s, quantiles, method="inverted_cdf") for s in (a, b)])
        )
        p = lower_bound(len(a) - np.searchsorted(a, thresholds, side="left"), len(a), _CHOICE)
        q = upper_bound(len(b) - np.searchsorted(b, thresholds, side="left"), len(b), _CHOICE)
        value = special.ndtri(p) - special.ndtri(q) if gaussian else from_probabilities(p, q, delta)
        i = int(np.argmax(value))
        if value[i] > best:
            best, chosen = float(value[i]), Rule(float(thresholds[i]), sign)
    return chosen


def epsilon_bound(of_x: Array, of_other: Array, delta: float, error: float, *, gaussian: bool) -> float:
    """A lower bound on epsilon at delta that is wrong with probability at most `error`.

    Args:
        of_x, of_other: [N] a statistic of N independent releases of each neighbour. The first half chooses the rule, the second half
            judges it, by exact binomial bounds at error / 2 each.
        gaussian: the noise is known to be Gaussian (see the module's text).
    """
    half = min(len(of_x), len(of_other)) // 2
    rule = choose_rule(of_x[:half], of_other[:half], delta, gaussian=gaussian)
    trials = half
    hits, false = rule.counts(of_x[half : 2 * half], of_other[half : 2 * half])
    p, q = float(lower_bound(hits, trials, error / 2)), float(upper_bound(false, trials, error / 2))
    return (
        from_gaussian(p, q, delta) if gaussian else float(from_probabilities(np.array(p), np.array(q), delta))
    )


def ceiling(draws: int, delta: float, error: float, *, gaussian: bool) -> float:
    """The most that `epsilon_bound` can show with so many draws of each neighbour: a rule that is never wrong."""
    half = draws // 2
    p, q = float(lower_bound(half, half, error / 2)), float(upper_bound(0, half, error / 2))
    return (
        from_gaussian(p, q, delta) if gaussian else float(from_probabilities(np.array(p), np.array(q), delta))
    )
