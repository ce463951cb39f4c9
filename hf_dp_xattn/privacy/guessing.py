r"""What (epsilon, delta) means for an attacker who guesses one unit: an upper bound on the probability of being right.

**Game.** X is the private unit, drawn from a prior with max_x P(X = x) = p; all else is known to the attacker, who sees the release y and
names a guess. A_x: the outputs y at which the guess is x (disjoint). Success s = sum_x P(x) P_x(A_x).

**replace_one.** s <= (e^eps p + delta) / (1 - p + e^eps p): at delta = 0 the prior odds p / (1 - p) grow by at most e^eps.
*Proof.* For x != x': P_x(A_x) <= e^eps P_x'(A_x) + delta. Multiply by P(x) P(x') and sum over all pairs x != x'. The left side is
sum_x P(x) (1 - P(x)) P_x(A_x) >= (1 - p) s. On the right, P(x) <= p and sum_{x != x'} P_x'(A_x) <= 1 - P_x'(A_x') give at most
e^eps p (1 - s) + delta. Solve for s. *Attained* at delta = 0 by k-ary randomised response under the uniform prior, p = 1/k.
It is never more than either of the two hockey-stick forms below.

**add_or_remove_one.** Two values of a unit are two steps apart; both are one step from Q, the law of y without the unit.
s <= min(e^eps p + delta, 1 - e^-eps (1 - p - delta)).
*Proof.* P_x(A_x) <= e^eps Q(A_x) + delta, and the Q(A_x) sum to at most 1: s <= e^eps p sum_x Q(A_x) + delta. The failures:
Q(not A_x) <= e^eps P_x(not A_x) + delta, so 1 - s >= e^-eps (sum_x P(x) Q(not A_x) - delta) >= e^-eps (1 - p - delta).
*Attained* at delta = 0, p = 1/k by the law that names x with that probability and each other symbol equally often, Q uniform.

Compare Wasserman and Zhou, "A statistical framework for differential privacy", arXiv 0811.2501, and Kairouz, Oh, Viswanath, "The
composition theorem for differential privacy", arXiv 1311.0776 (the trade-off between the two kinds of error).
"""

from __future__ import annotations

import math

from ..errors import ConfigError
from .units import NeighboringRelation

PRIORS = (0.5, 0.01, 1e-6)
_LARGEST = 700.0  # e^700 is still a float; any bound is 1 there


def guess_bound(epsilon: float, delta: float, prior: float, neighboring: str = "replace_one") -> float:
    """Largest probability of guessing one unit after an (epsilon, delta)-DP release, for a prior probability of at most `prior`.

    Raises:
        ConfigError: epsilon < 0, delta outside [0, 1], prior outside (0, 1], or an unknown relation.
    """
    if not epsilon >= 0 or not 0 <= delta <= 1 or not 0 < prior <= 1:
        raise ConfigError(
            f"Need epsilon >= 0, delta in [0, 1] and prior in (0, 1], got {epsilon!r}, {delta!r}, {prior!r}."
        )
    try:
        relation = NeighboringRelation(neighboring)
    except ValueError:
        raise ConfigError(
            f"Unknown neighboring {neighboring!r}; choose one of {', '.join(NeighboringRelation)}."
        ) from None
    shrink = math.exp(-min(epsilon, _LARGEST))
    if relation is NeighboringRelation.REPLACE_ONE:
        return min(1.0, (prior + delta * shrink) / ((1 - prior) * shrink + prior))
    return min(1.0, prior / shrink + delta, 1 - shrink * (1 - prior - delta))
