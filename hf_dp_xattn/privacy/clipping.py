r"""Clipping of whole contributions, and the sensitivity that follows.

*Contribution.* A unit u (a row, a group of rows, or the context) contributes one vector c(u): everything that it adds
to the release, over all layers, heads, channels and the normaliser, concatenated, as integers. c(u) is a function of
the unit's own rows and of public data only.

*Clipping.* c(u) is replaced by a(u) = trunc(t c(u)) with t = min(1, C (1 - s) / |c(u)|), s = 2^-20, |.| the l2 norm
and trunc towards zero in every coordinate.

*Claim.* |a(u)| <= C. *Proof.* trunc(y)^2 <= y^2 in every coordinate, so |a(u)| <= |fl(t c(u))|, fl being the rounding of the
product to float64, and |fl(t c)| <= t |c| (1 + 2^-53). The norm in t is computed: the squares are of integers, and N nonnegative
terms added in any order in float64 err by a factor within 1 +- (N + 1) 2^-53, which for N <= 2^28 coordinates (enforced) is
within 1 +- 2^-24. So t |c| <= C (1 - 2^-20) (1 + 2^-24), and |a(u)| < C. QED.
The clipped vector's norm is computed again and checked against C before any noise is drawn (`verify_clipped`).

*Sensitivity.* S = sum_u a(u) is an exact integer sum.
replace_one: S - S' = a(u) - a(u'), so |S - S'| <= 2 C (triangle inequality).
add_or_remove_one: S - S' = +-a(u), so |S - S'| <= C.
Clipping around a public centre m, a(u) = clip(c(u) - m), gives the same bounds for the sum of a(u); adding N m back is
post-processing when N, the number of units, is public (replace_one).
"""

from __future__ import annotations

import torch

from ..errors import DPXAttnError

SLACK = 2.0**-20
MAX_COORDINATES = 2**28


def clip_factor(norm_squared: torch.Tensor, bound: int) -> torch.Tensor:
    """t = min(1, C (1 - slack) / |c|) per unit, in float64; `norm_squared` and `bound` in lattice units."""
    norm = torch.sqrt(norm_squared.to(torch.float64)).clamp_min(1.0)
    return torch.clamp(bound * (1.0 - SLACK) / norm, max=1.0)


def verify_clipped(norm_squared: torch.Tensor, bound: int) -> None:
    """Defence in depth: raises before noise is drawn if a clipped contribution could exceed the bound.

    Raises:
        DPXAttnError: the bound does not hold (an internal error; nothing leaves).
    """
    if not bool((norm_squared.to(torch.float64) <= float(bound) ** 2 * (1.0 - SLACK / 4)).all()):
        raise DPXAttnError(
            "A clipped contribution exceeds its bound: refusing to release. Please report this."
        )
