"""`DPTree`: segment trees over n numbers, noised once, that answer batches of range sums by gather."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch

from ...errors import ConfigError
from ...privacy.bits import Entropy, SystemEntropy
from ...privacy.lattice import quantize
from .budget import BudgetSplit, Part, noise_error

NUMBER_BITS = 30


def number_of_leaves(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def level_name(name: str, level: int) -> str:
    """Name of a tree's level in a `BudgetSplit`; level 0 holds the leaves."""
    return f"{name}, level {level}"


def build_levels(leaves: torch.Tensor) -> list[torch.Tensor]:
    """[..., 2^k] leaves -> k + 1 levels [..., 2^k], ..., [..., 1]: a node is the sum of its two children (exact for integers)."""
    levels = [leaves]
    while levels[-1].shape[-1] > 1:
        levels.append(levels[-1].unflatten(-1, (-1, 2)).sum(-1))
    return levels


def range_sums(levels: Sequence[torch.Tensor], low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Sums over the leaves low <= i < high of every tree: levels [..., nodes], low and high [..., q] -> [..., q].

    At most two nodes a level, and one node (the root) for the whole range. Leading dimensions broadcast.
    """
    shape = torch.broadcast_shapes(levels[0].shape[:-1], low.shape[:-1], high.shape[:-1])
    low, high = (t.expand(*shape, t.shape[-1]) for t in torch.broadcast_tensors(low, high))
    total = torch.zeros_like(low, dtype=levels[0].dtype)
    for nodes in levels:
        nodes, last = nodes.expand(*shape, nodes.shape[-1]), nodes.shape[-1] - 1
        left = (low < high) & (low % 2 == 1)
        right = (low < high) & (high % 2 == 1)
        total = total + left * nodes.gather(-1, low.clamp(0, last))
        total = total + right * nodes.gather(-1, (high - 1).clamp(0, last))
        low, high = (low + 1) // 2, high // 2
    return total


class DPTree:
    """Segment trees over n numbers each; every node holds the sum of its range plus truncated Laplace noise.

    *Source.* arXiv 2407.14717, DPTree. *Formal guarantee.* `init` is (epsilon, delta)-DP when number i of every tree is replaced
    (`replace_one`) or set to 0 (`add_or_remove_one`) for one i: it changes one node a level and tree, by at most factor * bound.

    *Error.* A range reads at most 2 (L - 1) nodes, L = 1 + log2(leaves), so with t the noise scale (L factor bound / epsilon for one tree)
    it is at most 2 sqrt(2) t max(sqrt(2 (L - 1) ln(2/beta)), ln(2/beta)) with probability 1 - beta (`budget.noise_error`), i.e.
    O(bound log(n)^1.5 / epsilon), and at most 2 (L - 1) B for all queries at once, adaptive ones too, with certainty.
    """

    def __init__(self, levels: Sequence[torch.Tensor], split: BudgetSplit) -> None:
        self.levels = tuple(levels)
        self.split = split

    @classmethod
    def init(
        cls,
        numbers: torch.Tensor,
        *,
        epsilon: float,
        delta: float,
        bound: float,
        neighboring: str = "replace_one",
        entropy: Entropy | None = None,
    ) -> Self:
        """numbers [..., n], clipped to [-bound, bound] (they may be signed); all leading dimensions are trees of one release."""
        if numbers.ndim < 1 or numbers.numel() == 0 or not bool(torch.isfinite(numbers).all()):
            raise ConfigError(f"numbers must be finite and not empty, got shape {list(numbers.shape)}.")
        if not (math.isfinite(bound) and bound > 0):
            raise ConfigError(f"bound must be positive and finite, got {bound!r}.")
        *lead, n = numbers.shape
        count = math.prod(lead)
        names = [level_name("numbers", level) for level in range(number_of_leaves(n).bit_length())]

        def parts_at(bits: int) -> list[Part]:
            norm = math.isqrt(count * 4**bits - 1) + 1
            return [Part(name, count, norm, bound * 2.0**-bits) for name in names]

        bits, split = BudgetSplit.fit_lattice(
            parts_at, NUMBER_BITS, epsilon=epsilon, delta=delta, neighboring=neighboring
        )
        leaves = numbers.new_zeros(*lead, number_of_leaves(n), dtype=torch.int64)
        leaves[..., :n] = quantize(numbers, 2.0**bits / bound, 2**bits).to(torch.int64)
        sums = dict(zip(names, ([level] for level in build_levels(leaves)), strict=True))
        released = split.noised(sums, SystemEntropy() if entropy is None else entropy)
        return cls([released[name][0] for name in names], split)

    def query(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """[..., q] sums over low <= i < high; integer tensors [q] or [..., q]."""
        leaves = self.levels[0].shape[-1]
        return range_sums(self.levels, low.clamp(0, leaves), high.clamp(0, leaves))

    def error_bound(self, beta: float) -> float:
        """What the noise of one range sum exceeds with probability at most beta."""
        name = self.split.parts[0].name
        nodes = max(1, 2 * (len(self.levels) - 1))
        return noise_error([self.split.scale(name)] * nodes, beta, nodes * self.split.limit(name))
