"""Which plans of votes a library has: from how many units on a list is better released as votes than unit by unit, and for which texts.

Decided by public units of contexts that were held out, pooled to lists of n units. A list is judged by the best matching between its units
and the released texts (1 - cosine, mean): for answers, whose order is known, that is as good or better than unit by unit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from ...mechanisms.anchors.histogram import prepare_geometric
from ...mechanisms.library.votes import Reading, reach_of
from ...privacy.additive import GeometricNoise
from ...privacy.bits import SeededEntropy
from ...privacy.rank_response import RankResponse
from .levels import nearest_of
from .library_plans import Pick, PublicUnits, Shelving
from .stored_plan import LibraryQuality, spread
from .vote_plan import VotePlan

SIZES = (30, 100, 300, 1000)  # of lists
LEVELS = (16, 64, 256, 1024)  # of texts that are voted for
_LISTS = 3  # held-out lists of a size
_FITTED = 12  # public lists by which a prior's dispersion is fitted
_SPARSE = 0.7  # of epsilon, what keeps empty entries empty, where there are more entries than units
_COVER = 16.0  # entries are chosen as for answers at this epsilon: near to all units


def matched(units: torch.Tensor, texts: torch.Tensor) -> float:
    """Mean 1 - cosine between [n, p] units and as many texts, under the best matching."""
    cost = 1.0 - units @ texts.mT
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[torch.from_numpy(rows), torch.from_numpy(columns)].mean())


@dataclass(frozen=True, eq=False)
class Voting:
    """shelving: of all public texts. public: units whose texts may stand in a list. held: of other contexts."""

    shelving: Shelving
    public: PublicUnits
    held: PublicUnits
    _levels: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    @property
    def sizes(self) -> list[int]:
        """Of lists that held-out units give twice at least."""
        return [n for n in SIZES if 2 * n <= len(self.held.text)]

    def lists(self, units: PublicUnits, size: int, most: int) -> list[PublicUnits]:
        """Contexts in a random order, one after the other, cut into lists."""
        generator = torch.Generator().manual_seed(self.shelving.seed + size)
        contexts = units.context.unique()
        place = torch.zeros(int(contexts.max()) + 1, dtype=torch.int64)
        place[contexts] = torch.randperm(len(contexts), generator=generator)
        order = torch.argsort(place[units.context], stable=True)
        return [units.where(members) for members in order.split(size) if len(members) == size][:most]

    def cells(self, units: PublicUnits, entries: torch.Tensor) -> torch.Tensor:
        codes = self.shelving.codes
        return nearest_of(codes[units.text], codes[entries])

    def plans(self, epsilon: float, picks: Sequence[Pick]) -> list[VotePlan]:
        """One for each size of lists. picks: what answers at this epsilon, of public units alone."""
        return [self._plan(epsilon, size, picks) for size in self.sizes]

    def _plan(self, epsilon: float, size: int, picks: Sequence[Pick]) -> VotePlan:
        lists = self.lists(self.held, size, _LISTS)
        answers = [self._answers(members, epsilon, picks, i) for i, members in enumerate(lists)]
        best: VotePlan | None = None
        for level in LEVELS:
            entries = self.entries(self.public, level)
            plan = self._of(epsilon, size, entries, self.public)
            votes = [self._votes(members, plan, i) for i, members in enumerate(lists)]
            mean, low, high = spread(torch.tensor([f for f, _ in votes]))
            quality = LibraryQuality(mean, low, high, float(np.mean([e for _, e in votes])), len(lists))
            if best is None or mean < best.quality.distortion:
                best = dataclasses.replace(plan, quality=quality, answers=max(0.0, float(np.mean(answers))))
            if len(entries) < level:
                break
        assert best is not None
        return best

    def entries(self, units: PublicUnits, size: int) -> torch.Tensor:
        """[K] int64, rising: texts that are near to all units."""
        key = id(units), size
        if key not in self._levels:
            self._levels[key] = self.shelving.entries(units, size, None, _COVER)
        return self._levels[key]

    def _of(self, epsilon: float, size: int, entries: torch.Tensor, units: PublicUnits) -> VotePlan:
        """A plan that is not judged yet: shares and dispersion of public contexts."""
        grouped = units.where(units.context >= 0)
        count = torch.bincount(self.cells(grouped, entries), minlength=len(entries)).double() + 0.5
        share = count / count.sum()
        lists = self.lists(grouped, size, _FITTED)
        votes = [torch.bincount(self.cells(u, entries), minlength=len(entries)).double() for u in lists]
        mean = share * size
        beyond = sum(float(((v - mean).square() - mean).sum()) for v in votes) / max(1, len(votes))
        dispersion = float(mean.square().sum()) / beyond if beyond > 0 and votes else 1e3
        share_plus = _SPARSE if len(entries) > size else 0.5
        quality = LibraryQuality(1.0, 1.0, 1.0, 1.0, 1)
        bounded = min(1e3, max(1e-3, dispersion))
        return VotePlan(epsilon, size, share_plus, bounded, 1.0, quality, entries, share.float())

    def _votes(self, members: PublicUnits, plan: VotePlan, seed: int) -> tuple[float, float]:
        """Distortion of a list that is released by votes, and of one without noise."""
        codes, size = self.shelving.codes, len(members.text)
        exact = torch.bincount(self.cells(members, plan.entries), minlength=len(plan.entries))
        noise = prepare_geometric(
            plan.epsilon,
            cells=len(exact),
            unit="row",
            neighboring="replace_one",
            share_plus=plan.share_plus,
        ).noise
        assert isinstance(noise, GeometricNoise)
        votes = exact + noise.sample(len(exact), SeededEntropy(seed))
        reading = Reading(("",) * len(exact), plan.share, plan.dispersion)
        counts = reading.counts(votes, size, noise.log_weight, reach_of(noise))
        texts = (plan.entries.repeat_interleave(c) for c in (counts, exact))
        released, clean = (matched(codes[members.text], codes[t]) for t in texts)
        return released, clean

    def _answers(self, members: PublicUnits, epsilon: float, picks: Sequence[Pick], seed: int) -> float:
        """Distortion of a list of which each unit is answered by itself."""
        codes, entropy = self.shelving.codes, SeededEntropy(seed)
        text = torch.empty_like(members.text)
        for shelf, pick in zip(self.shelving.shelves, picks, strict=True):
            here = (
                torch.ones_like(members.shelf, dtype=torch.bool) if shelf is None else members.shelf == shelf
            )
            response = RankResponse.of(epsilon, len(pick.entries), pick.near)
            order = (codes[members.text[here]] @ codes[pick.entries].mT).topk(response.near, dim=1).indices
            text[here] = pick.entries[response.perturb(order, entropy)]
        return matched(codes[members.text], codes[text])

    def refitted(self, plan: VotePlan, units: PublicUnits) -> VotePlan:
        """The same plan, of all public units."""
        entries = self.entries(units, len(plan.entries))
        new = self._of(plan.epsilon, plan.units, entries, units)
        return dataclasses.replace(plan, dispersion=new.dispersion, entries=entries, share=new.share)
