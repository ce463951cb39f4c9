r"""`MedianOfCopies`: the paper's device for adaptive queries, and what can be promised without it.

*Privacy* needs no device: queries are post-processing, however they are chosen.

*Accuracy, as the paper argues it.* Let k copies, released independently with (epsilon/k, delta/k) each, answer a fixed query within E
with probability at least 3/4 each. Their median is outside only if half of them are, which has probability at most exp(-k/8)
(Hoeffding: P(Bin(k, 1/4) >= k/2) <= exp(-2 k / 16)). Over a net of N queries the median is within E at all of them with probability
1 - N exp(-k/8), and between them within E plus the Lipschitz constant of the answers times the net's width; `copies_for` gives k. An
adversary that adapts to answers cannot leave the net's guarantee, since it holds for all queries at once.

*What it costs.* Each copy has k times (basic composition) the noise of one release. One release whose noise is bounded needs none of it:
`DPTreeSoftmax.uniform_error_bound` holds for all queries at once, since an answer is linear in the noise and no noise is large;
for Gaussian kernel sums `gaussian_uniform_bound` does, since |phi(q) . Z| <= |phi(q)| |Z|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch

from hf_dp_xattn.errors import ConfigError


class Queryable(Protocol):
    """What answers queries: a structure of this package, released."""

    def query(self, y: torch.Tensor) -> torch.Tensor: ...


class MedianOfCopies:
    """The median, coordinate by coordinate, of independently released copies of a structure.

    *Source.* arXiv 2407.14717, section on adaptive queries. *Formal guarantee.* (epsilon, delta)-DP by basic composition of `copies`
    releases at (epsilon/copies, delta/copies). *Error.* Module's docstring, with E the copies' `error_bound(1/4)`.
    """

    def __init__(self, copies: Sequence[Queryable]) -> None:
        if not copies:
            raise ConfigError("A median needs at least one copy.")
        self.copies = tuple(copies)

    @classmethod
    def init(
        cls, build: Callable[[float, float], Queryable], *, copies: int, epsilon: float, delta: float
    ) -> Self:
        """build(epsilon, delta) releases one copy; it is called `copies` times. An odd number has a middle."""
        if copies < 1 or copies % 2 == 0:
            raise ConfigError(f"copies must be odd and positive, got {copies!r}.")
        return cls([build(epsilon / copies, delta / copies) for _ in range(copies)])

    def query(self, y: torch.Tensor) -> torch.Tensor:
        """The shape that one copy answers with."""
        return torch.stack([copy.query(y) for copy in self.copies]).median(dim=0).values


def copies_for(net: float, beta: float) -> int:
    """The least odd k with net * exp(-k/8) <= beta: then the median is within E on a net of that size with probability 1 - beta."""
    k = math.ceil(8.0 * math.log(net / beta))
    return max(1, k + (k + 1) % 2)


def net_size(radius: float, width: float, dim: int) -> float:
    """Points of a net of a ball in R^dim: every query is within `width` of one. (1 + 2 radius/width)^dim is always enough."""
    return (1.0 + 2.0 * radius / width) ** dim


def gaussian_uniform_bound(sigma: float, features: int, query_norm: float, beta: float) -> float:
    """What |phi(q) . Z| exceeds for no q with |phi(q)| <= query_norm, with probability 1 - beta; Z ~ N(0, sigma^2)^features.

    |phi . Z| <= |phi| |Z|, and P(|Z| > sigma (sqrt(r) + sqrt(2 ln(1/beta)))) <= beta for every vector of independent coordinates that are
    subgaussian with sigma (Hsu, Kakade, Zhang, "A tail inequality for quadratic forms of subgaussian random vectors", 2012), which the
    discrete Gaussian is (arXiv 2004.00010, Corollary 17).
    """
    return query_norm * sigma * (math.sqrt(features) + math.sqrt(2.0 * math.log(1.0 / beta)))
