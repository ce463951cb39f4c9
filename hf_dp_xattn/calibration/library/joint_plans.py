"""Plans for contexts that are ONE unit in several parts, all of them answered together.

One draw among all combinations of the parts' lists tells more than a draw for each part at its share of epsilon: the parts stand or fall
together (`privacy/joint_response.py`). How long each part's list is, is chosen by held-out units: a part that matters little, or that a few
texts tell, has a short one, down to one text, and leaves the room to others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...errors import ConfigError
from ...privacy.joint_response import MAX_PARTS, ProductResponse
from .levels import MOVES
from .library_intervals import of_one_context
from .library_plans import TRIAL, Lists, PublicUnits, Ranked, Shelving, by_context
from .stored_plan import JointPlan, LibraryPlan, LibraryQuality

_SIZES = (
    *sorted({1, *(n * 2**i for i in range(9) for n in (2, 3))}),
    1024,
)  # of lists, in halves of a doubling; beyond them all
_WRONG = 1
_LEAN = 2.0  # above log K: medoids for answers that are true about seven times in eight
_PARTS = 24  # by how many an epsilon is shared in longer contexts


@dataclass(frozen=True)
class Level:
    """Of a list of `size` entries: the mean cosine of a place's units with their nearest entry, and with any."""

    size: int
    first: float
    any: float


@dataclass(frozen=True, eq=False)
class JointPlanner:
    """units: all public ones; public: those whose texts may answer where plans are chosen; held: those that judge."""

    shelving: Shelving
    units: PublicUnits
    public: PublicUnits
    held: PublicUnits
    longest: int
    _levels: dict[tuple[int, int], tuple[Level, torch.Tensor]] = field(default_factory=dict, repr=False)

    def plan(self, epsilon: float) -> LibraryPlan:
        """The plan for contexts of any number of parts."""
        each = self.shelving.plan(self.units, self.public, self.held, epsilon / _PARTS, answers=0)
        lists, joint = Lists(), []
        shelves = tuple(lists.add(each.lists[index], near) for index, near in each.shelves)
        held = self.held.some(len(self.held.text), self.shelving.seed)
        lengths = dict(zip(*(t.tolist() for t in held.context.unique(return_counts=True)), strict=True))
        parts = torch.tensor([lengths[c] for c in held.context.tolist()])
        expected = torch.full((2, len(parts)), math.nan)
        for m in range(1, min(self.longest, MAX_PARTS) + 1):
            places = self.shelving.places.shelves(m)
            sizes, wrong = self._best(epsilon, places)
            response = ProductResponse.of(
                epsilon, [self._level(s, k)[0].size for s, k in zip(places, sizes, strict=True)], wrong
            )
            for i, (shelf, k) in enumerate(zip(places, sizes, strict=True)):
                here = (parts == m) & (held.shelf == shelf)
                for unseen in (False, True) if bool(here.any()) else ():
                    ranked = self.shelving.ranked(held.where(here), self._level(shelf, k)[1], unseen=unseen)
                    expected[int(unseen), here] = _expected(response, i, ranked)
            entries_of = [self._entries(self.units, shelf, k) for shelf, k in zip(places, sizes, strict=True)]
            joint.append(JointPlan(tuple(lists.add(entries)[0] for entries in entries_of), wrong))
        known = ~expected[0].isnan()
        quality = each.quality if not bool(known.any()) else LibraryQuality(
            *of_one_context(*(by_context(1.0 - index[known], held.context[known]) for index in expected)),
            each.quality.exact,
            len(held.context[known].unique()),
        )  # fmt: skip
        return dataclasses.replace(
            each,
            epsilon=epsilon,
            lists=tuple(lists.all),
            shelves=shelves,
            quality=quality,
            joint=tuple(joint),
        )

    def _entries(self, units: PublicUnits, shelf: int, level: int, moves: int = MOVES) -> torch.Tensor:
        size = _SIZES[level] if level < len(_SIZES) else 0
        return self.shelving.entries(units, size, shelf, math.log(size or 2 * _SIZES[-1]) + _LEAN, moves)

    def _level(self, shelf: int, level: int) -> tuple[Level, torch.Tensor]:
        if (shelf, level) not in self._levels:
            entries = self._entries(self.public, shelf, level, TRIAL)
            ranked = self.shelving.ranked(self.shelving.judges(self.held, shelf), entries)
            means = float(ranked.top[:, 0].mean()), float(ranked.total.mean()) / ranked.size
            self._levels[shelf, level] = Level(ranked.size, *means), entries
        return self._levels[shelf, level]

    def _best(self, epsilon: float, places: Sequence[int]) -> tuple[list[int], int]:
        """Levels of each part's list, and `wrong`: from equal ones, one or two parts at a time, as long as that helps."""
        equal = min(epsilon, 30.0) / len(places)
        start = [min(range(len(_SIZES)), key=lambda k: abs(math.log(_SIZES[k]) - equal))] * len(places)
        allowed = range(min(_WRONG, len(places) - 1) + 1)
        best = max(((self._score(epsilon, places, start, d), start, d) for d in allowed), key=lambda b: b[0])
        while True:
            before = best[0]
            for levels in _around(best[1]):
                for wrong in allowed:
                    score = self._score(epsilon, places, levels, wrong)
                    if score > best[0] + 1e-9:
                        best = score, levels, wrong
            if best[0] == before:
                return best[1], best[2]

    def _score(self, epsilon: float, places: Sequence[int], levels: Sequence[int], wrong: int) -> float:
        """The sum of expected cosines."""
        lists = [self._level(s, k)[0] for s, k in zip(places, levels, strict=True)]
        try:
            response = ProductResponse.of(epsilon, [x.size for x in lists], wrong)
        except ConfigError:
            return -math.inf  # too many combinations
        return sum(_cosine(response, i, x.size, x.first, x.any) for i, x in enumerate(lists))


def _around(levels: list[int]) -> list[list[int]]:
    """Levels with one part's list one or two levels longer or shorter, or one longer and another shorter."""
    steps = [(i, d) for i in range(len(levels)) for d in (2, 1, -1, -2)]
    moves = [
        *([s] for s in steps),
        *([a, b] for a in steps for b in steps if a[1] > 0 > b[1] and a[0] != b[0]),
    ]
    neighbours = []
    for move in moves:
        new = list(levels)
        for i, d in move:
            new[i] += d
        if all(0 <= k <= len(_SIZES) for k in new):
            neighbours.append(new)
    return neighbours


def _cosine(response: ProductResponse, part: int, size: int, first: float, any_one: float) -> float:
    other = (size * any_one - first) / (size - 1) if size > 1 else any_one
    right = response.right(part)
    return response.truth * (right * first + (1 - right) * other) + (1 - response.truth) * any_one


def _expected(response: ProductResponse, part: int, ranked: Ranked) -> torch.Tensor:
    """[n]: the expected cosine of each unit at a part's place."""
    size, right = ranked.size, response.right(part)
    mean, first = ranked.total / size, ranked.top[:, 0]
    other = (ranked.total - first) / (size - 1) if size > 1 else mean
    return response.truth * (right * first + (1 - right) * other) + (1 - response.truth) * mean
