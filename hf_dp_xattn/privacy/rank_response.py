r"""Exact response by rank: an entry of a public list, near ones more often than far ones.

*Formal guarantee.* Public: a list of K entries and a profile w_1 >= w_2 >= ... >= w_K > 0 of integer weights by rank, W their sum. A
private unit u orders the entries by a permutation rank_u of {1, ..., K}, a function of u alone. **Released:** R(u), with P(R(u) = j) =
w_{rank_u(j)} / W. **Theorem:** for all units u, u' and every entry j, P(R(u) = j) / P(R(u') = j) is the ratio of two weights, at most
w_1 / w_K <= e^epsilon, so R is epsilon-DP for replacing the unit, delta = 0. The normaliser W is one constant for all units, because each
of them permutes the same weights: none of the factor 2 that the exponential mechanism pays for a normaliser that moves.
**Several units** (public slots, fresh coins each): replacing one of them changes one answer, so the whole list is epsilon-DP, by
parallel composition; their number must be public (`replace_one`).
**Exactness:** the rank is drawn before any unit is looked at, from one integer uniform below W (`bits.uniform_below`).

*Which profile.* Two levels (the t nearest entries at odds e^epsilon to the others) are the extreme points of all such profiles, so the best
one for any expected distortion is among them and their mixtures (staircases: Kairouz, Oh, Viswanath, arXiv 1407.1338; subset selection: Ye
and Barg, arXiv 1702.00610). t = 1 is k-ary randomised response. Choose t on public data: it is part of the mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from .accountant import PureEvent
from .bits import Entropy, uniform_below
from .response import MAX_ALPHABET, RandomizedResponse, Response, check_odds

LIMIT = 1 << 48  # of `uniform_below`


@dataclass(frozen=True)
class RankResponse(Response):
    """Answers by rank; made by `of`.

    counts: how many ranks each level has, the nearest entries first.
    weights: the integer weight of each rank of a level, falling from level to level.
    epsilon: what is charged.

    Raises:
        ConfigError: no profile, too large a one, or w_1 / w_K above e^epsilon.
    """

    counts: tuple[int, ...]
    weights: tuple[int, ...]
    epsilon: Fraction

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) != len(self.weights):
            raise ConfigError("A profile needs as many weights as counts, and at least one of each.")
        if min(self.counts) < 1 or min(self.weights) < 1:
            raise ConfigError("Counts and weights of a profile are positive integers.")
        if list(self.weights) != sorted(self.weights, reverse=True):
            raise ConfigError("A profile's weights must not rise with the rank.")
        if self.size > MAX_ALPHABET or self.total > LIMIT:
            raise ConfigError(
                f"The profile is too large: at most {MAX_ALPHABET} entries, and weights that sum to 2^48 or less. Take fewer near entries."
            )
        check_odds(self.weights[0], self.weights[-1], self.epsilon)

    @classmethod
    def of(cls, epsilon: float | Fraction, size: int, nearest: int = 1) -> RankResponse:
        """Two levels: the `nearest` entries at the largest odds that epsilon allows to each other one.

        Args:
            epsilon: privacy loss for replacing the unit; above about 19.4 it is not used up.
            size: number of entries K, 2 to 2^20.
            nearest: how many ranks are near, 1 to size - 1.

        Raises:
            ConfigError: out of range.

        Example:
            >>> response = RankResponse.of(2.0, size=16, nearest=2)
            >>> round(response.probability(1), 3), round(response.probability(3), 3)
            (0.257, 0.035)
        """
        if isinstance(nearest, bool) or not isinstance(nearest, int) or not 1 <= nearest < max(size, 2):
            raise ConfigError(f"`nearest` must be an integer from 1 to size - 1, got {nearest!r}.")
        response = RandomizedResponse.of(epsilon, size)  # checks the rest, and rounds the odds down
        odds, unit = response.odds, response.unit
        while nearest * odds + (size - nearest) * unit > LIMIT:  # coarser weights, whose ratio is no larger
            odds, unit = odds >> 1, (unit + 1) >> 1
        return cls((nearest, size - nearest), (max(odds, unit), unit), response.epsilon)

    @property
    def size(self) -> int:
        """Number of entries K."""
        return sum(self.counts)

    @property
    def near(self) -> int:
        """How many ranks a unit's own order decides: all but those of the last level, whose entries have equal odds in any order."""
        return self.size - self.counts[-1]

    @property
    def width(self) -> int:
        return self.near

    @property
    def total(self) -> int:
        """The normaliser W, the same for every unit."""
        return sum(c * w for c, w in zip(self.counts, self.weights, strict=True))

    @property
    def event(self) -> PureEvent:
        """What is charged."""
        return PureEvent(self.epsilon)

    def probability(self, rank: int) -> float:
        """P(the entry at this rank is the answer), rank from 1.

        Raises:
            ConfigError: no such rank.
        """
        end = 0
        for count, weight in zip(self.counts, self.weights, strict=True):
            end += count
            if 1 <= rank <= end:
                return weight / self.total
        raise ConfigError(f"Ranks are 1 to {self.size}, got {rank!r}.")

    def expect(self, by_rank: Sequence[float] | npt.NDArray[np.float64]) -> float:
        """The expectation of a public quantity of the answer.

        Args:
            by_rank: [K] its value at each rank, nearest first.

        Raises:
            ConfigError: another number of values.
        """
        values = np.asarray(by_rank, dtype=np.float64)
        if values.shape != (self.size,):
            raise ConfigError(f"Expected {self.size} values, one a rank, got {list(values.shape)}.")
        ends = np.cumsum(self.counts)
        sums = [math.fsum(values[e - c : e]) for e, c in zip(ends, self.counts, strict=True)]
        return math.fsum(w / self.total * s for w, s in zip(self.weights, sums, strict=True))

    def draw(self, units: int, entropy: Entropy) -> npt.NDArray[np.int64]:
        """Ranks [units], from 0, with fresh coins each: no unit is looked at. Unit i answers with its entry at rank draw[i].

        Args:
            units: how many; public.
            entropy: the operating system's in release mode.
        """
        u = uniform_below(entropy, units, self.total)
        counts, weights = (np.array(x, dtype=np.int64) for x in (self.counts, self.weights))
        ends = np.cumsum(counts * weights)
        level = np.searchsorted(ends, u, side="right")
        first = np.cumsum(counts) - counts
        within = (u - (ends - counts * weights)[level]) // weights[level]
        ranks: npt.NDArray[np.int64] = first[level] + within
        return ranks

    def answer(self, near: npt.NDArray[np.int64], ranks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The entries [m] at ranks [m] of units whose nearest entries are `near` [m, t]; further ranks go through the others by index.

        Raises:
            ConfigError: `near` does not hold t distinct entries for each unit.
        """
        m, t = near.shape if near.ndim == 2 else (-1, -1)
        if t != self.near or m != len(ranks) or (m and not 0 <= near.min() <= near.max() < self.size):
            raise ConfigError(f"Near entries must be integers [m, {self.near}] in [0, {self.size}).")
        ordered = np.sort(near, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            raise ConfigError("A unit's near entries must be distinct.")
        if t == 0:
            return ranks
        # the x-th entry that is not near: x and as many steps as near entries stand before it
        beyond = np.maximum(ranks - t, 0)
        other = beyond + (ordered - np.arange(t) <= beyond[:, None]).sum(1)
        ranked = np.take_along_axis(near, np.minimum(ranks, t - 1)[:, None], axis=1)[:, 0]
        return np.where(ranks < t, ranked, other).astype(np.int64)

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 [m, t], the entries nearest to each unit in order, on any device -> answers [m] (CPU).

        Raises:
            ConfigError: see `answer`.
        """
        return torch.from_numpy(self.answer(integers.cpu().numpy(), self.draw(len(integers), entropy)))

    def log_weights(self, integers: torch.Tensor, answers: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        logs = np.log(np.repeat(np.array(self.weights, dtype=np.float64), self.counts)[: self.near])
        total = np.zeros(len(answers))
        for unit, candidates in enumerate(integers.cpu().numpy()):
            total += (answers[:, unit, None] == candidates) @ (logs - math.log(self.weights[-1]))
        return total
