"""Error bounds that the paper states."""

from __future__ import annotations

import math


def attention_relative_error(eps_s: float) -> float:
    """2 eps_s / (1 - eps_s), the paper's bound on the relative error of the ratio (infinite from eps_s = 1 on).

    Numerator and normaliser lie within factors 1 +- eps_s of the exact ones (for values of one sign), so
    their ratio lies within (1 + eps_s)/(1 - eps_s) = 1 + 2 eps_s/(1 - eps_s).
    """
    return math.inf if eps_s >= 1.0 else 2.0 * eps_s / (1.0 - eps_s)
