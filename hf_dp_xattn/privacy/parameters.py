"""Noise parameters of a truncated Laplace release, from the (epsilon, delta) that it shall have."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

from ..errors import ConfigError
from .accountant import (
    PAD,
    Losses,
    check_delta,
    check_epsilon,
    epsilon_of,
    epsilon_of_curve,
    laplace_scale,
    largest_passing,
    renyi_curve,
    rounded_up,
)
from .events import TruncatedLaplaceEvent, require_integer
from .noise import MIN_SCALE
from .truncated_laplace import truncation_bound

MIN_DELTA = (
    2.0**-128
)  # tails are bounded by numbers of 160 bits: below that, no bound would ever be proven small enough
_SHARE = 64  # of delta, one part in so many goes to truncation where the rest serves composition


def truncated_laplace_event(
    epsilon: float,
    delta: float,
    sensitivity: int,
    *,
    largest: int | None = None,
    squared: Fraction | int | None = None,
) -> TruncatedLaplaceEvent:
    """Least truncated Laplace noise for a vector of these sensitivities with `epsilon_of([event], delta) <= epsilon`.

    The smaller of two scales: the plain one, sensitivity / epsilon, where all of delta goes to truncation (the paper's parameters; exact
    for one number), and one for which the joint Renyi curve is converted, where a 64th of delta does. The bound is the smallest that the
    summed distributions allow. Checked forward. Raises `ConfigError` for invalid arguments.
    """
    delta = check_delta(delta, zero=False)
    if delta < MIN_DELTA:
        raise ConfigError(
            f"Truncated Laplace noise needs delta >= {MIN_DELTA:.3g}, got delta = {delta:.3g}: raise it."
        )
    l1 = require_integer(sensitivity, "sensitivity")

    def event(scale: Fraction, off: float) -> TruncatedLaplaceEvent:
        bound = truncation_bound(scale, l1, off, largest)
        return TruncatedLaplaceEvent(l1, scale, bound, largest, squared)

    def unbounded(scale: Fraction) -> TruncatedLaplaceEvent:
        return TruncatedLaplaceEvent(l1, scale, l1, largest, squared)

    plain = max(laplace_scale(epsilon, l1), MIN_SCALE)
    epsilon = float(check_epsilon(epsilon))
    rest = delta * (1 - 1 / _SHARE) * (1 - PAD)

    def fits(scale: Fraction) -> bool:
        return epsilon_of_curve(renyi_curve(Losses(truncated=Counter([unbounded(scale)]))), rest) <= epsilon

    inverse = largest_passing(lambda inverse: fits(1 / Fraction(inverse)))
    if inverse is not None:
        scale = max(rounded_up(1 / Fraction(inverse), fits), MIN_SCALE)
        composed = event(scale, delta / _SHARE)
        if scale < plain and epsilon_of([composed], delta) <= epsilon:
            return composed
    return event(plain, delta)
