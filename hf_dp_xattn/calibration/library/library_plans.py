"""The plan for each epsilon: at each place how many texts may answer, which ones, and how many count as near.

Everything is decided by public units of contexts that were held out, by the expected cosine between a unit and its answer. A place has a
size of its own: where a prompt ends with one of eight backgrounds, eight texts are enough, and are told far more often than hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ...errors import ConfigError
from ...mechanisms.library.places import PLACES, Places
from ...privacy.rank_response import RankResponse
from .levels import MOVES, medoids
from .library_intervals import kinds_of, of_one_context
from .stored_plan import LibraryPlan, LibraryQuality

TRIAL = 2  # rounds of moves, where sizes are compared
_NEAR = (1, 2, 4, 8, 16)
_LARGEST_LEVEL = 12  # 2^12; beyond it all texts may answer
_CERTAIN = 100  # times as many texts: odds that tell the nearest one nearly always
_FEW = 12  # held-out units of one place that are enough to judge by
_BLOCK = 2**24  # cosines that are held at once
_HELD = 1000  # held-out units that are looked at
_ELSEWHERE = 0.05  # weight of a text that stands at other places, and of one in contexts of other lengths
_ENOUGH = 60  # contexts, for buckets of lengths


@dataclass(frozen=True, eq=False)
class PublicUnits:
    """text, context, shelf [n]: which text each unit is, which context it is of (-1: of
    none, it was made by recombination), and which shelf answers at its place."""

    text: torch.Tensor
    context: torch.Tensor
    shelf: torch.Tensor

    def where(self, which: torch.Tensor) -> PublicUnits:
        return PublicUnits(self.text[which], self.context[which], self.shelf[which])

    def joined(self, other: PublicUnits) -> PublicUnits:
        pairs = ((self.text, other.text), (self.context, other.context), (self.shelf, other.shelf))
        return PublicUnits(*(torch.cat(pair) for pair in pairs))

    def some(self, count: int, seed: int) -> PublicUnits:
        """At most `count` of them, by a random choice."""
        return self.where(
            torch.randperm(len(self.text), generator=torch.Generator().manual_seed(seed))[:count]
        )

    def weights(self, texts: int, shelf: int | None) -> torch.Tensor:
        """[texts]: how often each text stands at this shelf's place; elsewhere it counts less."""
        count = torch.ones(len(self.text))
        if shelf is not None:
            count[self.shelf % len(PLACES) != shelf % len(PLACES)] *= _ELSEWHERE
            count[self.shelf // len(PLACES) != shelf // len(PLACES)] *= _ELSEWHERE
        return torch.zeros(texts).index_add_(0, self.text, count)


def places_for(lengths: list[int]) -> Places:
    """Buckets of contexts' lengths: thirds, where there are contexts enough."""
    if len(lengths) < _ENOUGH:
        return Places()
    rising = sorted(lengths)
    cuts = {rising[len(rising) // 3], rising[2 * len(rising) // 3]} - {rising[-1]}
    return Places(tuple(sorted(cuts)))


def sizes_for(epsilon: float) -> list[int]:
    """Numbers of texts that may be worth a look at epsilon, rising: 2, 3, 4, 6, 8, 12, ..."""
    most = 1.5 * math.exp(min(0.9 * epsilon, 30.0))
    rising = sorted({2, 3, *(n * 2**i for i in range(1, _LARGEST_LEVEL) for n in (2, 3))})
    return [n for n in rising if n <= max(3.0, most)]


@dataclass(frozen=True, eq=False)
class Ranked:
    """top [n, t]: each unit's largest cosines with the entries of its shelf, falling. total [n]: the sum over all K of them."""

    top: torch.Tensor
    total: torch.Tensor
    size: int

    @classmethod
    def of(
        cls,
        units: torch.Tensor,
        entries: torch.Tensor,
        kinds: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Ranked:
        """Codes [n, p] and [K, p] of length 1; no more than a block of cosines is ever held. kinds [n] and [K]: an entry of a unit's own
        kind counts as the mean of the others."""
        keep, parts = min(_NEAR[-1], len(entries)), []
        rows = max(1, _BLOCK // len(entries))
        for at, block in enumerate(units.split(rows)):
            cosines = block @ entries.mT
            if kinds is not None:
                same = kinds[0][at * rows : at * rows + len(block)].unsqueeze(1) == kinds[1]
                others = (~same).sum(1, keepdim=True)
                mean = cosines.masked_fill(same, 0.0).sum(1, keepdim=True) / others.clamp_min(1)
                cosines = torch.where(same, mean, cosines)
            parts.append((cosines.topk(keep, dim=1).values, cosines.sum(1)))
        return cls(torch.cat([t for t, _ in parts]), torch.cat([s for _, s in parts]), len(entries))

    def expected(self, response: RankResponse) -> torch.Tensor:
        """[n]: each unit's expected cosine."""
        last = response.weights[-1] / response.total
        mean, done = last * self.total, 0
        for count, weight in zip(response.counts[:-1], response.weights[:-1], strict=True):
            mean = mean + (weight / response.total - last) * self.top[:, done : done + count].sum(1)
            done += count
        return mean


@dataclass(frozen=True, eq=False)
class Pick:
    """For one place: K (0: all texts), t, which texts these are, and the mean expected cosine."""

    size: int
    near: int
    entries: torch.Tensor
    mean: float


@dataclass(frozen=True, eq=False)
class Shelving:
    """codes [N, p]: of all public texts, of length 1. places: which shelves there are. apart: each place has one of its own."""

    codes: torch.Tensor
    places: Places
    seed: int
    apart: bool = True

    @property
    def shelves(self) -> list[int | None]:
        """All shelves; None: one for all places."""
        return [*range(self.places.size)] if self.apart else [None]

    def entries(
        self, units: PublicUnits, size: int, shelf: int | None, epsilon: float, moves: int = MOVES
    ) -> torch.Tensor:
        """[K] int64, rising: which texts of `units` stand on a shelf."""
        whole = units.weights(len(self.codes), None)
        if size == 0 or size >= int((whole > 0).sum()):
            return whole.nonzero().squeeze(1)
        return medoids(self.codes, units.weights(len(self.codes), shelf), size, epsilon, self.seed, moves)

    def judges(self, held: PublicUnits, shelf: int | None) -> PublicUnits:
        """Held-out units that tell how a shelf does: its own, or where they are few all at such a place, or all."""
        if shelf is None:
            return held.some(_HELD, self.seed)
        here = held.where(held.shelf == shelf)
        alike = held.where(held.shelf % len(PLACES) == shelf % len(PLACES))
        chosen = next((u for u in (here, alike) if len(u.text) >= _FEW), held)
        return chosen.some(_HELD, self.seed)

    def ranked(self, units: PublicUnits, entries: torch.Tensor, *, unseen: bool = False) -> Ranked:
        """The cosines of units with entries. unseen: as if no entry were of a unit's kind."""
        kinds = (self.kinds[units.text], self.kinds[entries]) if unseen else None
        return Ranked.of(self.codes[units.text], self.codes[entries], kinds)

    @cached_property
    def kinds(self) -> torch.Tensor:
        """[N]: of all texts."""
        return kinds_of(self.codes, self.seed)

    def pick(
        self,
        public: PublicUnits,
        held: PublicUnits,
        shelf: int | None,
        epsilon: float,
        start: int,
        steps: Sequence[int],
    ) -> Pick:
        """What does best at one place: from size to size as long as that helps.

        Args:
            public: units whose texts may answer. held: units of other contexts. start: the size to begin at, by these steps.
        """
        judges, texts = self.judges(held, shelf), len(public.text.unique())
        sizes = [k for k in sizes_for(epsilon) if k < texts]
        tried: dict[int, Pick] = {}

        def at(size: int) -> float:
            if size not in tried:
                tried[size] = self._try(
                    self.entries(public, size, shelf, epsilon, TRIAL), size, judges, epsilon
                )
            return tried[size].mean

        odds = math.exp(min(epsilon, 30.0))
        if not sizes or odds > texts:
            at(0)
        if odds > _CERTAIN * texts:  # the nearest of all texts is told nearly always
            sizes = []
        i = min(range(len(sizes)), key=lambda j: abs(math.log(sizes[j] / start)), default=0)
        for step in steps if sizes else ():  # in halves of a doubling
            while True:
                around = [j for j in (i, i - step, i + step) if 0 <= j < len(sizes)]
                best = max(around, key=lambda j: at(sizes[j]))
                if best == i:
                    break
                i = best
        return max(tried.values(), key=lambda p: p.mean)

    def _try(self, entries: torch.Tensor, size: int, judges: PublicUnits, epsilon: float) -> Pick:
        ranked, best = self.ranked(judges, entries), None
        for near in (t for t in _NEAR if t < ranked.size):
            try:
                mean = float(ranked.expected(RankResponse.of(epsilon, ranked.size, near)).mean())
            except ConfigError:
                continue  # weights beyond 2^48
            if best is None or mean > best.mean:
                best = Pick(size, near, entries, mean)
        if best is None:
            raise ConfigError("A library needs at least 2 distinct public texts.")
        return best

    def plan(
        self, units: PublicUnits, public: PublicUnits, held: PublicUnits, epsilon: float, answers: int = 1
    ) -> LibraryPlan:
        """Chosen by `held` with the texts of `public`, then made of all public `units`."""
        return self.refitted(self.picks(public, held, epsilon), units, public, held, epsilon, answers)

    def picks(self, public: PublicUnits, held: PublicUnits, epsilon: float) -> list[Pick]:
        """What does best at each place, of the texts of `public`."""
        picks: list[Pick] = []
        stood = torch.cat([public.shelf, held.shelf]).unique().tolist()
        start = round(math.exp(min(0.7 * epsilon, 8.0)))
        for shelf in self.shelves:
            if picks and shelf not in stood:  # no public unit stands there: as the place before
                picks.append(picks[-1])
                continue
            steps = (2, 1) if picks else (4, 2, 1)
            picks.append(self.pick(public, held, shelf, epsilon, start, steps))
            start = picks[-1].size or start
        return picks

    def refitted(
        self,
        picks: Sequence[Pick],
        units: PublicUnits,
        public: PublicUnits,
        held: PublicUnits,
        epsilon: float,
        answers: int = 1,
    ) -> LibraryPlan:
        """The plan of these picks, of all public `units`."""
        lists = Lists()
        numbers: list[tuple[int, int]] = []
        for i, (shelf, pick) in enumerate(zip(self.shelves, picks, strict=True)):
            same = i > 0 and pick is picks[i - 1]
            numbers.append(
                numbers[-1] if same else lists.add(self.entries(units, pick.size, shelf, epsilon), pick.near)
            )
        quality = self._quality(picks, public, held, epsilon)
        return LibraryPlan(
            epsilon,
            answers,
            tuple(lists.all),
            tuple(numbers if len(set(numbers)) > 1 else numbers[:1]),
            quality,
        )

    def _quality(
        self, picks: Sequence[Pick], public: PublicUnits, held: PublicUnits, epsilon: float
    ) -> LibraryQuality:
        """Of all held-out units, each at its own place; by context."""
        held = held.some(_HELD, self.seed)
        expected, exact = torch.zeros(2, len(held.text)), self.ranked(held, public.text.unique()).top[:, 0]
        for shelf, pick in zip(self.shelves, picks, strict=True):
            here = torch.ones_like(held.shelf, dtype=torch.bool) if shelf is None else held.shelf == shelf
            if bool(here.any()):
                for i, unseen in enumerate((False, True)):
                    ranked = self.ranked(held.where(here), pick.entries, unseen=unseen)
                    expected[i, here] = ranked.expected(RankResponse.of(epsilon, ranked.size, pick.near))
        seen, unseen_kinds = (by_context(1.0 - cosines, held.context) for cosines in expected)
        return LibraryQuality(*of_one_context(seen, unseen_kinds), 1.0 - float(exact.mean()), len(seen))


class Lists:
    """Lists of entries, each once."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    def add(self, entries: torch.Tensor, near: int = 1) -> tuple[int, int]:
        """(its number, near), near at most one less than it holds."""
        index = next((i for i, known in enumerate(self.all) if torch.equal(known, entries)), len(self.all))
        if index == len(self.all):
            self.all.append(entries)
        return index, max(1, min(near, len(entries) - 1))


def by_context(values: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    _, at, count = torch.unique(context, return_inverse=True, return_counts=True)
    mean: torch.Tensor = torch.zeros(len(count)).index_add_(0, at, values) / count
    return mean
