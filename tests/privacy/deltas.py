"""The reverse of `epsilon_of`, by which tests tell how tight it is and that it understates nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_dp_xattn.privacy import accountant


def delta_of(events: Sequence[accountant.Event], epsilon: float) -> float:
    """Smallest delta that we can certify for the composition of `events` at `epsilon`; rounded up, at most 1.

    *Formal guarantee.* The composed releases are (epsilon, delta_of(events, epsilon))-DP: arXiv 2004.00010,
    Proposition 12, over `ORDERS`, plus what truncation takes; that alone (0 without a truncated event) where no event
    is Gaussian and the epsilons add to no more than `epsilon`. Raises `ConfigError` for an unknown event or an epsilon
    that is not positive and finite.
    """
    epsilon = float(accountant.check_epsilon(epsilon))
    events = accountant._checked(events)
    losses = accountant._split(events)
    off = accountant._up(losses.off)
    if accountant.plain_epsilon(events) <= epsilon:
        return min(1.0, off)
    r = accountant.renyi_curve(losses)
    if not np.isfinite(r.min()):
        return 1.0
    eps = math.nextafter(epsilon, 0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = (accountant._A - 1) * (r + eps + np.abs(accountant._LOG1M)) + accountant._LOG_A
        log_delta = (
            (accountant._A - 1) * (r - eps + accountant._LOG1M) - accountant._LOG_A + accountant.PAD * scale
        )
    log_delta = np.where(np.isfinite(log_delta), log_delta, math.inf)
    total_variation = math.sqrt(-math.expm1(-float(r.min())))
    exponent = min(0.0, float(log_delta.min()))
    smallest = min(1.0, accountant._next(math.exp(exponent)), accountant._next(total_variation))
    return min(1.0, accountant._next(off + smallest)) if off else smallest
