"""A quality that was measured at some epsilons, read at others, and the smallest epsilon that reaches a wanted one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MEASURED, INTERPOLATED, OUTSIDE = "calibrated", "interpolated", "outside the calibrated range"
SCALED = "of fewer units than were calibrated"


@dataclass(frozen=True)
class Estimate:
    """A predicted quality and its 95 % interval; none is claimed outside the range that was measured. origin: how it was found."""

    value: float
    low: float | None
    high: float | None
    origin: str


@dataclass(frozen=True)
class Wanted:
    """The smallest epsilon for a wanted quality.

    epsilon: where the prediction reaches it; surely: the smallest calibrated epsilon with all of the interval on the right side; None:
    not reached. lowest: it is already reached at the smallest calibrated epsilon. best, best_epsilon: the best prediction of all, and
    the smallest epsilon that has it.
    """

    name: str
    target: float
    higher_is_better: bool
    epsilon: float | None
    surely: float | None
    lowest: bool
    best: float
    best_epsilon: float
    largest: float

    def __str__(self) -> str:
        goal = f"{self.name} {'>=' if self.higher_is_better else '<='} {self.target:g}"
        best = f"the best is {self.best:.3g} at epsilon = {self.best_epsilon:g}"
        if self.epsilon is None:
            return f"{goal}: not reached up to epsilon = {self.largest:g} ({best})"
        where = f"epsilon = {self.epsilon:g}"
        if self.lowest:
            where += " or less (the smallest calibrated one)"
        sure = "at no calibrated epsilon" if self.surely is None else f"from epsilon = {self.surely:g}"
        return f"{goal}: {where}; with all of the 95 % interval {sure}"


@dataclass(frozen=True)
class Curve:
    """Points (epsilon, value, low, high) in the order of epsilon; linear in log epsilon between them."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    higher_is_better: bool

    @classmethod
    def of(
        cls, name: str, points: Iterable[tuple[float, float, float, float]], *, higher_is_better: bool
    ) -> Curve | None:
        """Without the points that are not finite (epsilon = 0 or infinite: references, not releases); None where nothing is left."""
        usable = sorted(p for p in points if p[0] > 0 and all(math.isfinite(x) for x in p))
        return cls(name, tuple(usable), higher_is_better) if usable else None

    def at(self, epsilon: float) -> Estimate:
        """Between two points the interval spans both of theirs; outside it is the nearest point, flagged, without an interval."""
        for e, value, low, high in self.points:
            if e == epsilon:
                return Estimate(value, low, high, MEASURED)
        if epsilon < self.points[0][0]:
            return Estimate(self.points[0][1], None, None, OUTSIDE)
        for a, b in pairwise(self.points):
            if a[0] < epsilon < b[0]:
                share = math.log(epsilon / a[0]) / math.log(b[0] / a[0])
                value = a[1] + share * (b[1] - a[1])
                return Estimate(value, min(a[2], b[2]), max(a[3], b[3]), INTERPOLATED)
        return Estimate(self.points[-1][1], None, None, OUTSIDE)

    def wanted(self, target: float) -> Wanted:
        """Where the curve first reaches the target, which is where its running best does: more budget never needs to be worse, since a
        release at the smaller epsilon is always allowed."""
        sign = -1.0 if self.higher_is_better else 1.0

        def meets(value: float) -> bool:
            return sign * value <= sign * target

        first = self.points[0]
        epsilon = first[0] if meets(first[1]) else None
        for a, b in pairwise(self.points):
            if epsilon is None and meets(b[1]):
                share = (a[1] - target) / (a[1] - b[1])
                epsilon = min(b[0], _round_up(a[0] * (b[0] / a[0]) ** share))
        sure = [p[0] for p in self.points if meets(p[2] if self.higher_is_better else p[3])]
        best = min(self.points, key=lambda p: sign * p[1])
        return Wanted(
            name=self.name,
            target=target,
            higher_is_better=self.higher_is_better,
            epsilon=epsilon,
            surely=min(sure, default=None),
            lowest=meets(first[1]),
            best=best[1],
            best_epsilon=best[0],
            largest=self.points[-1][0],
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "higher_is_better": self.higher_is_better,
            "points": [dict(zip(("epsilon", "value", "low", "high"), p, strict=True)) for p in self.points],
        }


def _round_up(value: float) -> float:
    """To three significant digits, never down."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.ceil(value / step * (1 - 1e-12)) * step:.3g}")
