"""Intervals of ratios of sums over contexts. Contexts of one kind are alike, so what counts is how many kinds there are."""

from __future__ import annotations

import torch
from scipy import special


def t_quantile(probability: float, freedom: int) -> float:
    """Of Student's distribution.

    Args:
        probability: more than 1/2.
        freedom: degrees, 2 at least are counted.
    """
    return float(special.stdtrit(max(2, freedom), probability))


def ratio_interval(
    over: torch.Tensor,
    under: torch.Tensor,
    kinds: torch.Tensor,
    confidence: float = 0.95,
    *,
    fresh: bool = False,
    widened: float = 1.0,
) -> tuple[float, float, float]:
    """(value, low, high): the mean over columns of sum(over) / sum(under), two-sided.

    Linearised: kind g moves the ratio by z_g = sum over its contexts of (over - ratio under) / sum(under), and the standard error is
    sqrt(K / (K - 1) sum z_g^2) for K kinds.

    Args:
        over: [N, L].
        under: [N, L], with positive sums.
        kinds: [N] int64.
        confidence: of the interval.
        fresh: the interval is of what as many contexts of other kinds would give, which vary as much themselves (sqrt(2) times as wide);
            else of the mean over all kinds.
        widened: factor of the standard error.
    """
    total = under.sum(0).clamp_min(1e-30)
    ratio = over.sum(0) / total
    moved = ((over - ratio * under) / total).mean(1)
    groups = torch.unique(kinds, return_inverse=True)[1]
    count = int(groups.max()) + 1
    z = torch.zeros(count, dtype=moved.dtype).index_add_(0, groups, moved)
    value = float(ratio.mean())
    if count < 2:
        return value, 0.0, float("inf")
    error = float((z.square().sum() * count / (count - 1)).sqrt())
    reach = t_quantile(0.5 + confidence / 2, count - 1) * error * widened * (2.0**0.5 if fresh else 1.0)
    return value, max(0.0, value - reach), value + reach
