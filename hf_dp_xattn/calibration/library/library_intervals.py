"""How well a library serves, with an interval that holds for a single context, also for one of a kind that no public text is of.

Held-out public contexts are like the others, and a mean over many of them is known well; but a user has one context, which may say what no
public one does. So the interval begins at what the best served of the held-out contexts get, and ends at what the worst served get when
every text of their own *kind* (clusters of all public texts by their codes) counts no more than any other text does.
"""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ..anchors.kmeans import assign, kmeans

KINDS = 48
_OF_A_KIND = 8
_TAIL = 0.025
_ENOUGH = 20  # contexts, for the tails of what they get


def kinds_of(codes: torch.Tensor, seed: int) -> torch.Tensor:
    """[N] int64: the kind of each text, of codes [N, p]; its own where texts are too few or too alike to tell kinds."""
    count = min(KINDS, len(codes) // _OF_A_KIND)
    try:
        return assign(codes, kmeans(codes, count, seed=seed, per_cell=1))[0]
    except ConfigError:
        return torch.arange(len(codes))


def of_one_context(seen: torch.Tensor, unseen: torch.Tensor) -> tuple[float, float, float]:
    """The mean of seen, and an interval for one context; from all to nothing where too few contexts were held out to tell.

    Args:
        seen: [n] distortion of each held-out context.
        unseen: [n] the same, where the texts of its units' kinds were of no use.
    """
    mean = float(seen.mean())
    low, high = float(seen.quantile(_TAIL)), float(unseen.quantile(1.0 - _TAIL))
    if len(seen) < _ENOUGH:
        low, high = 0.0, max(high, 1.0)
    return mean, max(0.0, min(low, mean)), min(2.0, max(high, mean))
