"""One budget over unlike releases: the Gaussian noise that still fits beside events that are already fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from ..errors import ConfigError
from .accountant import Event, GaussianEvent, epsilon_of, gaussian_sigma_squared
from .noise import MAX_SIGMA_SQUARED, MIN_SIGMA_SQUARED

_STEPS = 2**20  # resolution of the variance: one part in a million
_TOLERANCE = 1e-6  # of epsilon that may stay unused
_MAX_DOUBLINGS = 20  # of the variance: a thousand times the noise that epsilon alone needs carries nothing


def gaussian_sigma_squared_beside(
    epsilon: float, delta: float, sensitivity: int, others: Sequence[Event]
) -> int | Fraction:
    """Least Gaussian noise such that `others` and this release together cost at most epsilon; at most 1e-6 of it stays unused.

    *Formal guarantee.* `epsilon_of([*others, GaussianEvent(sensitivity, result)], delta) <= epsilon`: evaluated for the very value that
    is returned, whatever the search did. The ledger charges by the same function. With no others: `gaussian_sigma_squared`.

    Raises:
        ConfigError: invalid parameters, the others alone leave nothing of epsilon, or the sampler cannot draw such noise.
    """
    return _least_beside(epsilon, delta, sensitivity, tuple(others))


@lru_cache(maxsize=256)  # a pure function that takes a second
def _least_beside(
    epsilon: float, delta: float, sensitivity: int, others: tuple[Event, ...]
) -> int | Fraction:
    alone = gaussian_sigma_squared(epsilon, delta, sensitivity)
    if not others:
        return _drawable(alone, epsilon)
    spent = epsilon_of(others, delta)
    nothing_left = ConfigError(
        f"The other releases cost epsilon = {spent:.6g} of {epsilon:.6g} at delta = {delta:.3g}: nothing is left for a Gaussian "
        "one. Give them a smaller share, or raise epsilon."
    )
    if spent >= epsilon:
        raise nothing_left

    def variance(steps: int) -> int | Fraction:
        value = Fraction(alone) * steps / _STEPS
        return math.ceil(value) if value >= 2**24 else value

    def cost(steps: int) -> float:
        return epsilon_of([*others, GaussianEvent(sensitivity, variance(steps))], delta)

    low, high = _STEPS, 2 * _STEPS  # `alone` is too little noise, or just enough
    over, left = cost(low) - epsilon, epsilon - cost(high)
    for _ in range(_MAX_DOUBLINGS):
        if left >= 0:
            break
        low, high, over, left = high, 2 * high, -left, epsilon - cost(2 * high)
    else:
        raise nothing_left
    # Regula falsi, Illinois variant: an evaluation beside pure events takes a tenth of a second, and bisection needs three times more.
    pull, side = left, 0
    while high - low > max(1, low // _STEPS) and left > _TOLERANCE * epsilon:
        share = over / (over + pull) if 0 < over < math.inf and pull > 0 else 0.5
        middle = low + min(max(round((high - low) * share), 1), high - low - 1)
        rest = epsilon - cost(middle)
        if rest >= 0:
            high, left, pull = middle, rest, rest
            over, side = (over / 2 if side > 0 else over), 1
        else:
            low, over = middle, -rest
            pull, side = (pull / 2 if side < 0 else pull), -1
    return _drawable(variance(high), epsilon)


def _drawable(variance: int | Fraction, epsilon: float) -> int | Fraction:
    if not MIN_SIGMA_SQUARED <= variance <= MAX_SIGMA_SQUARED:
        hint = "raise epsilon" if variance > MAX_SIGMA_SQUARED else "lower epsilon"
        raise ConfigError(
            f"epsilon = {epsilon!r} needs noise of variance {float(variance):.3g} on this lattice, which the sampler does not "
            f"draw: {hint}."
        )
    return int(variance) if variance.denominator == 1 else variance
