"""The plan for each epsilon: how many texts may answer, which ones at which place, and how many count as near.

Everything is decided by public units of contexts that were held out, by the expected cosine between a unit and its answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...mechanisms.library.places import PLACES, Places
from ...privacy.rank_response import RankResponse
from .levels import medoids
from .text_library import LibraryPlan, LibraryQuality, spread

_NEAR = (1, 2, 4, 8, 16)
_LARGEST_LEVEL = 12  # 2^12; beyond it all texts may answer
_BLOCK = 2**24  # cosines that are held at once
_HELD = 1000  # held-out units that are looked at
_ELSEWHERE = 0.15  # weight of a text that stands at other places, and of one in contexts of other lengths
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
    """Numbers of texts that may be worth a look at epsilon; 0: all of them."""
    low, high = math.exp(min(0.6 * epsilon, 30.0)) / 2, 1.5 * math.exp(min(0.9 * epsilon, 30.0))
    return [*(2**i for i in range(1, _LARGEST_LEVEL + 1) if low <= 2**i <= high), 0]


@dataclass(frozen=True, eq=False)
class Ranked:
    """top [n, t]: each unit's largest cosines with the entries of its shelf, falling. total [n]: the sum over all K of them."""

    top: torch.Tensor
    total: torch.Tensor
    size: int

    @classmethod
    def of(cls, units: torch.Tensor, entries: torch.Tensor) -> Ranked:
        """Codes [n, p] and [K, p] of length 1; no more than a block of cosines is ever held."""
        keep, parts = min(_NEAR[-1], len(entries)), []
        for block in units.split(max(1, _BLOCK // len(entries))):
            cosines = block @ entries.mT
            parts.append((cosines.topk(keep, dim=1).values, cosines.sum(1)))
        return cls(torch.cat([t for t, _ in parts]), torch.cat([s for _, s in parts]), len(entries))

    def expected(self, response: RankResponse) -> torch.Tensor:
        """[n]: each unit's expected cosine."""
        last = response.weights[-1] / response.total
        found, done = last * self.total, 0
        for count, weight in zip(response.counts[:-1], response.weights[:-1], strict=True):
            found = found + (weight / response.total - last) * self.top[:, done : done + count].sum(1)
            done += count
        return found


@dataclass(frozen=True)
class Choice:
    """K (0: all texts), t, whether each place has a shelf of its own, and how well that did."""

    size: int
    near: int
    apart: bool
    quality: LibraryQuality


@dataclass(frozen=True, eq=False)
class Shelving:
    """codes [N, p]: of all public texts, of length 1. places: which shelves there are."""

    codes: torch.Tensor
    places: Places
    seed: int

    def entries(self, units: PublicUnits, size: int, apart: bool, epsilon: float) -> torch.Tensor:
        """[S, K] int64, rising: which texts of `units` stand on each shelf."""
        texts = len(self.codes)
        whole = units.weights(texts, None)
        if size == 0 or size >= int((whole > 0).sum()):
            return whole.nonzero().T
        shelves = range(self.places.size) if apart else [None]
        return torch.stack(
            [medoids(self.codes, units.weights(texts, shelf), size, epsilon, self.seed) for shelf in shelves]
        )

    def ranked(self, units: PublicUnits, entries: torch.Tensor) -> Ranked:
        """The cosines of each unit with the entries of its shelf."""
        if len(entries) == 1:
            return Ranked.of(self.codes[units.text], self.codes[entries[0]])
        keep, size = min(_NEAR[-1], entries.shape[1]), entries.shape[1]
        found = Ranked(torch.empty(len(units.text), keep), torch.empty(len(units.text)), size)
        for shelf in units.shelf.unique().tolist():
            here = units.shelf == shelf
            own = Ranked.of(self.codes[units.text[here]], self.codes[entries[shelf]])
            found.top[here], found.total[here] = own.top, own.total
        return found

    def choose(self, public: PublicUnits, held: PublicUnits, epsilon: float) -> Choice:
        """What does best at epsilon for units of contexts that the library does not hold.

        Args:
            public: units whose texts may answer. held: units of other contexts.
        """
        held = held.some(_HELD, self.seed)
        best: tuple[float, int, int, bool, torch.Tensor] | None = None
        exact = torch.zeros(1)
        for size in sizes_for(epsilon):
            for apart in (False, True) if size else (False,):
                ranked = self.ranked(held, self.entries(public, size, apart, epsilon))
                exact = ranked.top[:, 0]  # at last of all texts
                for near in (t for t in _NEAR if t < ranked.size):
                    try:
                        response = RankResponse.of(epsilon, ranked.size, near)
                    except ConfigError:
                        continue  # weights beyond 2^48
                    found = ranked.expected(response)
                    if best is None or float(found.mean()) > best[0]:
                        best = float(found.mean()), size, near, apart, found
        if best is None:
            raise ConfigError("A library needs at least 2 distinct public texts.")
        distortion = _by_context(1.0 - best[4], held.context)
        quality = LibraryQuality(*spread(distortion), 1.0 - float(exact.mean()), len(distortion))
        return Choice(best[1], best[2], best[3], quality)

    def plan(self, public: PublicUnits, choice: Choice, epsilon: float) -> LibraryPlan:
        """The plan that was chosen, of all public units."""
        entries = self.entries(public, choice.size, choice.apart, epsilon)
        return LibraryPlan(epsilon, min(choice.near, entries.shape[1] - 1), 1, entries, choice.quality)


def _by_context(values: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    _, at, count = torch.unique(context, return_inverse=True, return_counts=True)
    mean: torch.Tensor = torch.zeros(len(count)).index_add_(0, at, values) / count
    return mean
