r"""What stands where a release says nothing, and how far decoded rows are drawn towards it. Post-processing.

A decoder that was trained on too little, or for another kind of context, can do worse than no release at all. So its rows are joined by
rows that do not depend on the release, in one softmax:

    o(q) = ( w sum_r exp(q.k_r + l_r) v_r + (1 - w) sum_f exp(q.k_f + l_f) v_f ) / ( the same without v ),

w in [0, 1]: chosen on held-out public contexts, for each epsilon. f: rows that stand for the public mean; or none ("none": no context at
all, where exact public rows stand beside). w = 1 leaves the decoded rows as they are, w = 0 is the fall-back itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..context_rows import ContextRows

FALLBACKS = ("mean", "none")
_SILENT = -60.0  # log weight of a row that no query sees beside public ones


@dataclass(frozen=True, eq=False)
class Fallback:
    """Rows [R, C] and log weights [R] that stand for the public mean: public, the same for every context."""

    rows: torch.Tensor
    log_weights: torch.Tensor

    TENSORS = ("rows", "log_weights")


@dataclass(frozen=True)
class Worth:
    """A plan beside no release at all, on held-out public contexts.

    against: the better one of `FALLBACKS`. weight: w. measure: what was compared, "fvu" or "divergence". ratio: the plan's over the
    fall-back's, less than 1 where the plan is better; high: with 95 % confidence it is no more than this.
    unlike: the largest such ratio of errors (a 95 % bound) over kinds of made-up contexts unlike all public ones
    (`calibration/anchors/unlike_contexts.py`); None: not measured.
    unseen_kinds: whether contexts of kinds that nothing was fitted to took part.
    """

    against: str
    weight: float
    measure: str
    ratio: float
    high: float
    unlike: float | None = None
    unseen_kinds: bool = True

    @property
    def useful(self) -> bool:
        """Better than no release with 95 % confidence."""
        return self.high < 1.0


def drawn(decoded: ContextRows, worth: Worth | None, fallback: Fallback | None) -> ContextRows:
    """Decoded rows with the fall-back's beside them.

    Args:
        decoded: of the release.
        worth: says w; None: they stay as they are.
        fallback: of the calibration.
    """
    if worth is None or worth.weight == 1.0:
        return decoded
    w = worth.weight
    lighter = decoded.log_weights + math.log(w) if w > 0 else torch.full_like(decoded.log_weights, _SILENT)
    if worth.against == "none" or fallback is None:
        return ContextRows(decoded.rows, lighter)
    rows, logs = fallback.rows.to(decoded.rows), fallback.log_weights.to(lighter) + math.log1p(-w)
    if w == 0:
        return ContextRows(rows, logs)
    return ContextRows(torch.cat([decoded.rows, rows]), torch.cat([lighter, logs]))
