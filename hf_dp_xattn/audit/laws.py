"""The law of a prepared release, for canaries: exact contributions, noise drawn in bulk, log-likelihoods.

A release is too slow to be made ten thousand times, and most of it need not be: what a context contributes is fixed, only the noise is
new. So the contributions are computed once, by the release's own code, and the noise is drawn in bulk by the release's own
sampler at the release's own parameters. That a real release is just this, bit for bit, is shown for a few of them by `replay.py`.

Coordinates in which no candidate differs from another have the same law under all of them and are left out: they tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError
from ..mechanisms.anchors.mixed import MixedSource
from ..mechanisms.anchors.release import (
    HistogramSource,
    PreparedAnchors,
    ResponseSource,
    SumSource,
    pool,
)
from ..mechanisms.contributions import sum_rows, sum_units, unit_rows
from ..mechanisms.histogram import GaussianNoise, GeometricNoise, PreparedHistogram
from ..mechanisms.kernel_sum import PreparedKernelSum
from ..mechanisms.row_sum import PreparedRowSum
from ..mechanisms.sketch import sum_sketch
from ..privacy.accountant import Event, GaussianEvent, needs_delta
from ..privacy.bits import Entropy

MAX_COORDINATES = 512  # of those in which candidates differ; those that differ most are looked at
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Context:
    """A canary. rows: what the mechanism is given, [n, C], or per layer keys [H, n, d] and values [H, n, dv]. groups [n]: public."""

    rows: Any
    groups: torch.Tensor | None = None


class Views(Protocol):
    """What k contexts contribute; private of real contexts, and here of canaries only."""

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        """[draws, k]: log-likelihood of releases of context `which` under each context, up to a number that all k share."""
        ...

    def gap(self, one: int, other: int) -> float:
        """How far apart two of them are, as a share of what one neighbouring step may change; above 1 nothing holds."""
        ...


class Law(Protocol):
    """A release whose public part is fixed."""

    @property
    def events(self) -> tuple[Event, ...]: ...

    def views(self, contexts: Sequence[Context]) -> Views: ...


Noise = GeometricNoise | GaussianNoise


@dataclass(frozen=True, eq=False)
class AdditiveViews:
    """totals [k, D]: exact integer sums. event: what is charged for them."""

    totals: torch.Tensor
    noise: Noise
    event: Event

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        spread = self.totals.amax(0) - self.totals.amin(0)
        seen = torch.argsort(spread, descending=True)[:MAX_COORDINATES]
        totals = self.totals[:, seen[spread[seen] > 0]]
        k, width = totals.shape
        found = np.zeros((draws, k))
        step = max(1, _CHUNK // max(1, k * width))
        for start in range(0, draws if width else 0, step):
            size = min(step, draws - start)
            noise = self.noise.sample(size * width, entropy).view(size, width)
            for c in range(k):
                found[start : start + size, c] = self.noise.log_weight(
                    noise + (totals[which] - totals[c])
                ).sum(-1)
        return found

    def gap(self, one: int, other: int) -> float:
        difference = self.totals[one] - self.totals[other]
        if isinstance(self.event, GaussianEvent):
            return float(difference.double().norm()) / self.event.sensitivity
        assert isinstance(self.noise, GeometricNoise)
        up, down = int(difference.clamp_min(0).sum()), int((-difference).clamp_min(0).sum())
        plus, minus = self.noise.rate_plus, self.noise.rate_minus
        loss = max(up * plus + down * minus, up * minus + down * plus)
        return float(loss / getattr(self.event, "epsilon", loss))


@dataclass(frozen=True, eq=False)
class ResponseViews:
    """cells [k, S]: each context's ONE unit's cell in each codebook."""

    source: ResponseSource
    cells: torch.Tensor

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        response = self.source.response
        odds = float(np.log(response.truth * (response.alphabet - 1) / (1 - response.truth)))
        found = np.zeros((draws, len(self.cells)))
        for stage in range(self.cells.shape[1]):
            answers = response.draw(np.full(draws, int(self.cells[which, stage])), entropy)
            found += odds * (answers[:, None] == self.cells[:, stage].numpy()[None])
        return found

    def gap(self, one: int, other: int) -> float:
        return int((self.cells[one] != self.cells[other]).sum()) / len(self.source.quantizers)


@dataclass(frozen=True, eq=False)
class JointViews:
    """Independent parts of one release."""

    parts: tuple[Views, ...]

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        return np.asarray(sum(p.scores(which, draws, entropy) for p in self.parts))

    def gap(self, one: int, other: int) -> float:
        return max(p.gap(one, other) for p in self.parts)


def _histogram_views(prepared: PreparedHistogram, cells: Sequence[torch.Tensor]) -> AdditiveViews:
    totals = torch.stack([prepared.exact_sums(c).cpu() for c in cells])
    return AdditiveViews(totals, prepared.noise, prepared.events[0])


def _sum_views(prepared: PreparedRowSum, rows: Sequence[torch.Tensor]) -> AdditiveViews:
    totals = torch.stack([prepared.exact_sums(r).cpu() for r in rows])
    return AdditiveViews(totals, GaussianNoise(prepared.sigma_squared), prepared.events[0])


@dataclass(frozen=True, eq=False)
class AnchorsLaw:
    """`anchors`: contexts are rows [n, C]."""

    prepared: PreparedAnchors

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    def views(self, contexts: Sequence[Context]) -> Views:
        source = self.prepared.source
        if isinstance(source, SumSource):
            return _sum_views(source.prepared, [pool(c.rows, source.unit, c.groups) for c in contexts])
        if isinstance(source, HistogramSource):
            return self._counts(source, contexts)
        if isinstance(source, MixedSource):
            return JointViews(
                (self._counts(source.histogram, contexts), _sum_views(source.sum, [c.rows for c in contexts]))
            )
        assert isinstance(source, ResponseSource)
        cells = [torch.stack(source.cells(c.rows, c.groups)).T.reshape(-1).cpu() for c in contexts]
        if len({len(c) for c in cells}) > 1:
            raise ConfigError("Randomised response answers once for each unit: their number is public.")
        return ResponseViews(source, torch.stack(cells))

    @staticmethod
    def _counts(source: HistogramSource, contexts: Sequence[Context]) -> AdditiveViews:
        cells = [source.quantizer.cells(pool(c.rows, source.unit, c.groups)) for c in contexts]
        return _histogram_views(source.prepared, cells)


@dataclass(frozen=True, eq=False)
class KernelSumLaw:
    """`kernel_sum`: contexts are keys and values per layer."""

    prepared: PreparedKernelSum

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    def views(self, contexts: Sequence[Context]) -> Views:
        totals = torch.stack([torch.cat([t.cpu().flatten() for t in self.totals(c)]) for c in contexts])
        return AdditiveViews(totals, GaussianNoise(self.prepared.sigma_squared), self.prepared.events[0])

    def totals(self, context: Context) -> list[torch.Tensor]:
        """The exact integer sums that the release adds noise to: per layer, or the sketch."""
        p, (keys, values) = self.prepared, context.rows
        if p.sketch is None and p.config.unit == "row":
            return sum_rows(p.encoders, keys, values, p.bound)
        units = unit_rows(p.config.unit, keys[0].shape[-2], context.groups)
        if p.sketch is None:
            return sum_units(p.encoders, keys, values, p.bound, units)
        return [sum_sketch(p.encoders, keys, values, p.bound, units, p.sketch)]


def law_of(prepared: Any) -> Law | None:
    """The law of a prepared release, or None where there is none here (dptree; exact attention, which has none)."""
    if isinstance(prepared, PreparedAnchors):
        return AnchorsLaw(prepared)
    if isinstance(prepared, PreparedKernelSum):
        return KernelSumLaw(prepared)
    return None


def is_gaussian(events: Sequence[Event]) -> bool:
    """Whether all noise is Gaussian: then its trade-off curve is known up to one number."""
    return all(isinstance(e, GaussianEvent) for e in events)


def claimed(events: Sequence[Event], delta: float) -> tuple[float, float]:
    """(epsilon, delta) that the events are charged for; a pure release promises its epsilon at delta = 0."""
    from ..privacy.accountant import epsilon_of

    at = delta if needs_delta(events) else 0.0
    return epsilon_of(events, at), at
