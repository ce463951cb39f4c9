r"""Several answers from several public lists: each unit from the list of its place, or all parts of one unit together.

*Formal guarantee.* **By place** (`PlacedResponse`). Public: for each place a list and a profile (`rank_response.py`), none of them above
epsilon; which place each unit has. Released: one answer for each unit, by its place's profile, fresh coins each. Replacing one unit changes
the law of one answer, and that by at most its profile's epsilon: epsilon-DP, whatever the sizes of the lists.

**Together** (`ProductResponse`). Public: m lists of K_1, ..., K_m >= 1 entries, a number d of parts, weights W >= D > 0 with
W / D <= e^epsilon. One private unit has m parts, and with them an entry c_i(u) of each list. Let T be all tuples (one entry of each list),
N = K_1 ... K_m of them, and T_u those that differ from c(u) in at most d parts: F = sum_{j <= d} e_j(K_1 - 1, ..., K_m - 1) of them, e_j
the elementary symmetric polynomials, so that F is one number for all u. **Released:** R(u) in T with P(R(u) = y) = (W if y in T_u else D)
/ (N D + F (W - D)). **Theorem:** the normaliser is the same for all u, so P(R(u) = y) / P(R(u') = y) is D / W, 1 or W / D: epsilon-DP for
replacing the whole unit, delta = 0, by ONE answer; there is nothing to compose. d = 0 is randomised response over all N tuples. It tells
more than m answers at epsilon / m each, as the parts stand or fall together.
**Exactness:** one integer u uniform below N D + F (W - D). Where u < N D the answer is the (u // D)-th tuple, whatever the unit is; else
the one of T_u with number (u - N D) // (W - D), in an order of which parts differ and by how many entries, cyclically: a bijection for
each u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from ..errors import ConfigError
from .accountant import PureEvent
from .bernoulli import exp_neg_bounds
from .bits import Entropy, uniform_below
from .rank_response import LIMIT, RankResponse
from .response import Response, check_odds

Answers = npt.NDArray[np.int64]
MAX_PARTS = 16
_UNIT_BITS = 12  # resolution of the odds, where there is room for it
_CAP = Fraction(32)


@dataclass(frozen=True)
class PlacedResponse(Response):
    """responses: of each place.

    Raises:
        ConfigError: none.
    """

    responses: tuple[RankResponse, ...]

    def __post_init__(self) -> None:
        if not self.responses:
            raise ConfigError("Answers by place need a response for one place at least.")

    @property
    def near(self) -> int:
        """How many ranks a unit's own order decides, at most."""
        return max(r.near for r in self.responses)

    @property
    def width(self) -> int:
        return 1 + self.near

    @property
    def event(self) -> PureEvent:
        """What is charged."""
        return PureEvent(max(r.epsilon for r in self.responses))

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 [m, 1 + near]: each unit's place (public) and its nearest entries -> answers [m] (CPU).

        Raises:
            ConfigError: see `RankResponse.answer`; no such place.
        """
        rows = self._checked(integers)
        out = np.empty(len(rows), dtype=np.int64)
        for here, response in self._by_place(rows):
            ranks = response.draw(int(here.sum()), entropy)
            out[here] = response.answer(rows[here, 1 : 1 + response.near], ranks)
        return torch.from_numpy(out)

    def log_weights(self, integers: torch.Tensor, answers: Answers) -> npt.NDArray[np.float64]:
        rows, total = self._checked(integers), np.zeros(len(answers))
        for here, response in self._by_place(rows):
            total += response.log_weights(
                torch.from_numpy(rows[here, 1 : 1 + response.near]), answers[:, here]
            )
        return total

    def _by_place(self, rows: Answers) -> list[tuple[npt.NDArray[np.bool_], RankResponse]]:
        return [(rows[:, 0] == i, r) for i, r in enumerate(self.responses) if (rows[:, 0] == i).any()]

    def _checked(self, integers: torch.Tensor) -> Answers:
        rows: Answers = integers.cpu().numpy()
        if rows.ndim != 2 or rows.shape[1] != 1 + self.near:
            raise ConfigError(f"Units are [m, 1 + {self.near}]: a place and the nearest entries.")
        if len(rows) and not 0 <= rows[:, 0].min() <= rows[:, 0].max() < len(self.responses):
            raise ConfigError(f"Places are 0 to {len(self.responses) - 1}.")
        return rows


@dataclass(frozen=True)
class ProductResponse(Response):
    """One answer for all parts of a unit; made by `of`.

    sizes: of each part's list. wrong: d, how many parts of a near tuple may differ. odds, unit: W and D. epsilon: what is charged.

    Raises:
        ConfigError: no part or too many, an empty list, weights that sum to more than 2^48, or W / D above e^epsilon.
    """

    sizes: tuple[int, ...]
    wrong: int
    odds: int
    unit: int
    epsilon: Fraction

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= MAX_PARTS or min(self.sizes) < 1:
            raise ConfigError(f"A joint answer has 1 to {MAX_PARTS} parts with an entry each at least.")
        if not 0 <= self.wrong < len(self.sizes) or not 1 <= self.unit <= self.odds:
            raise ConfigError("A joint answer needs 0 <= wrong < parts, and odds of at least 1.")
        if self.total > LIMIT:
            raise ConfigError("These lists have too many combinations for one answer: take smaller ones.")
        check_odds(self.odds, self.unit, self.epsilon)

    @classmethod
    def of(cls, epsilon: float | Fraction, sizes: Sequence[int], wrong: int = 0) -> ProductResponse:
        """The largest odds that epsilon and 2^48 allow.

        Args:
            epsilon: privacy loss for replacing the whole unit; above 32 it is not used up.
            sizes: of each part's list. wrong: see the class.

        Raises:
            ConfigError: out of range, or more than 2^47 combinations.

        Example:
            >>> round(ProductResponse.of(8.0, (64, 64, 8)).truth, 3), round(ProductResponse.of(16.0, (64, 64, 8)).truth, 3)
            (0.083, 0.996)
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise ConfigError(f"epsilon must be positive and finite, got {epsilon!r}.")
        exact = min(Fraction(epsilon), _CAP)
        near, every = _tuples(sizes, wrong), math.prod(sizes)
        _, high = exp_neg_bounds(exact, 160)
        for bits in range(_UNIT_BITS, -1, -1):
            unit = 1 << bits
            # the upper end of e^-epsilon gives the smaller odds
            odds = min((unit << 160) // high, unit + (LIMIT - unit * every) // max(1, near))
            if unit * every <= LIMIT // 2 and (bits == 0 or odds == (unit << 160) // high):
                return cls(tuple(sizes), wrong, max(unit, odds), unit, exact)
        raise ConfigError("These lists have too many combinations for one answer: take smaller ones.")

    @property
    def near(self) -> int:
        """F, how many tuples are near."""
        return _tuples(self.sizes, self.wrong)

    @property
    def width(self) -> int:
        return 1

    @property
    def together(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """The normaliser."""
        return math.prod(self.sizes) * self.unit + self.near * (self.odds - self.unit)

    @property
    def truth(self) -> float:
        """P(an answer is drawn of the near tuples, and not of all alike)."""
        return self.near * (self.odds - self.unit) / self.total

    def right(self, part: int) -> float:
        """P(a part's own entry is the answer | a near tuple is drawn)."""
        others = [k for i, k in enumerate(self.sizes) if i != part]
        return _tuples(others, self.wrong) / self.near

    @property
    def event(self) -> PureEvent:
        """What is charged."""
        return PureEvent(self.epsilon)

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 [n m, 1], the entries of n units with m parts each -> answers [n m] (CPU).

        Raises:
            ConfigError: another number of parts, or no such entry.
        """
        cells = self._checked(integers)
        u = uniform_below(entropy, len(cells), self.total)
        answers = np.empty_like(cells)
        every = math.prod(self.sizes) * self.unit
        number = np.where(u < every, u // self.unit, 0)
        for i in range(len(self.sizes) - 1, -1, -1):
            answers[:, i] = number % self.sizes[i]
            number = number // self.sizes[i]
        near = u >= every
        if near.any():
            answers[near] = self._near(cells[near], (u[near] - every) // (self.odds - self.unit))
        return torch.from_numpy(answers.reshape(-1))

    def _near(self, cells: Answers, number: Answers) -> Answers:
        """The near tuples of `cells` [n, m] with these numbers: by which parts differ, and by how many entries each."""
        out, first = cells.copy(), 0
        for count in range(self.wrong + 1):
            for parts in combinations(range(len(self.sizes)), count):
                size = math.prod(self.sizes[i] - 1 for i in parts)
                here = (first <= number) & (number < first + size)
                rest = number[here] - first
                for i in reversed(parts):
                    out[here, i] = (cells[here, i] + 1 + rest % max(1, self.sizes[i] - 1)) % self.sizes[i]
                    rest = rest // max(1, self.sizes[i] - 1)
                first += size
        return out

    def log_weights(self, integers: torch.Tensor, answers: Answers) -> npt.NDArray[np.float64]:
        """[draws]: log-likelihood of answers [draws, m] of ONE unit with these entries [m, 1], up to a public number."""
        differ = (answers != self._checked(integers)[0]).sum(1)
        return np.where(differ <= self.wrong, math.log(self.odds), math.log(self.unit))

    def _checked(self, integers: torch.Tensor) -> Answers:
        m = len(self.sizes)
        if integers.ndim != 2 or integers.shape[1] != 1 or len(integers) % m:
            raise ConfigError(f"A joint answer is for {m} parts with one entry each.")
        cells: Answers = integers.cpu().numpy().reshape(-1, m)
        if (cells < 0).any() or (cells >= np.array(self.sizes)).any():
            raise ConfigError("An entry is not on its list.")
        return cells


def _tuples(sizes: Sequence[int], wrong: int) -> int:
    """How many tuples differ from a given one in at most `wrong` parts."""
    by_count = [1] + [0] * wrong
    for k in sizes:
        for j in range(wrong, 0, -1):
            by_count[j] += by_count[j - 1] * (k - 1)
    return sum(by_count)
