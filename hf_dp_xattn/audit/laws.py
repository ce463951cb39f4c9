"""The law of a prepared release, for canaries: exact contributions, noise drawn in bulk, log-likelihoods.

A release is too slow to be made ten thousand times, and most of it need not be: what a context contributes is fixed, only the noise is
new. So the contributions are computed once, by the release's own code, and the noise is drawn in bulk by the release's own
sampler at the release's own parameters. That a real release is just this, bit for bit, is shown for a few of them by `replay.py`.

Coordinates in which no candidate differs from another have the same law under all of them and are left out: they tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError
from ..mechanisms.anchors.anchors import (
    HistogramSource,
    PreparedAnchors,
    ResponseSource,
    SumSource,
    pool,
)
from ..mechanisms.anchors.histogram import GaussianNoise, GeometricNoise, PreparedHistogram
from ..mechanisms.anchors.mixed import MixedSource
from ..mechanisms.anchors.row_sum import PreparedRowSum
from ..mechanisms.dptree.dptree import PreparedDPTree
from ..mechanisms.dptree.tree_attention import exact_sums
from ..mechanisms.dptree.tree_moments import parts_of
from ..mechanisms.kernel_sum.contributions import sum_rows, sum_units, unit_rows
from ..mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from ..mechanisms.kernel_sum.sketch import sum_sketch
from ..privacy.accountant import Event, GaussianEvent, TruncatedLaplaceEvent, needs_delta
from ..privacy.bits import Entropy
from ..privacy.truncated_laplace import truncated_laplace

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


@dataclass(frozen=True)
class TruncatedLaplaceNoise:
    """P(z) ~ exp(-|z| / scale) for |z| <= bound, 0 beyond; in lattice steps."""

    scale: int | Fraction
    bound: int

    def sample(self, size: int, entropy: Entropy) -> torch.Tensor:
        """int64 [size]."""
        return torch.from_numpy(truncated_laplace(size, self.scale, self.bound, entropy=entropy))

    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        """log P(z) up to a constant, float64; -inf outside of the support."""
        steps = z.abs()
        return (steps.to(torch.float64) / -float(self.scale)).masked_fill(steps > self.bound, -torch.inf)


Noise = GeometricNoise | GaussianNoise | TruncatedLaplaceNoise


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
        if isinstance(self.event, TruncatedLaplaceEvent):
            l1, largest, squared = self.event.shape
            steps = difference.abs()
            norm = float(steps.double().square().sum() / float(squared)) ** 0.5
            # all three must hold; the price is that of the norm, as long as they do
            others = max(int(steps.sum()) / l1, int(steps.max()) / largest) if len(steps) else 0.0
            return others if norm <= 1 < others else norm
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


@dataclass(frozen=True, eq=False)
class DPTreeLaw:
    """`dptree`: contexts are keys and values per layer."""

    prepared: PreparedDPTree

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    @property
    def noise(self) -> TruncatedLaplaceNoise:
        event = self.prepared.split.event
        return TruncatedLaplaceNoise(event.scale, event.bound)

    @property
    def size(self) -> int:
        """Numbers that are released."""
        moments, encoders = self.prepared.plan.moments, self.prepared.plan.encoders
        channels = [e.geometry.heads * (e.geometry.value_dim + 1) for e in encoders]
        trees = sum(c * (e.features.size - 1) for c, e in zip(channels, encoders, strict=True))
        return len(moments.trees) * trees * (2 * moments.leaves - 1) + len(moments.plain) * sum(channels)

    def views(self, contexts: Sequence[Context]) -> Views:
        # a canary fills few of the trees' nodes, which are too many to keep for every context
        filled = []
        for context in contexts:
            flat = torch.cat([t.cpu().flatten() for part in self.parts(context).values() for t in part])
            at = flat.nonzero().squeeze(1)
            filled.append((at, flat[at]))
        every = torch.unique(torch.cat([at for at, _ in filled]))
        totals = torch.zeros(len(contexts), len(every), dtype=torch.int64)
        for row, (at, values) in zip(totals, filled, strict=True):
            row[torch.searchsorted(every, at)] = values
        return AdditiveViews(totals, self.noise, self.prepared.split.event)

    def parts(self, context: Context) -> dict[str, list[torch.Tensor]]:
        """The exact integer sums that the release adds noise to, part by part: every node of every tree, and what stands beside them."""
        p, (keys, values) = self.prepared, context.rows
        return parts_of(exact_sums(p.plan, p.config, keys, values, context.groups), p.plan.moments)


def law_of(prepared: Any) -> Law:
    """The law of a prepared release. Raises ConfigError where it has none (exact attention)."""
    if isinstance(prepared, PreparedAnchors):
        return AnchorsLaw(prepared)
    if isinstance(prepared, PreparedKernelSum):
        return KernelSumLaw(prepared)
    if isinstance(prepared, PreparedDPTree):
        return DPTreeLaw(prepared)
    raise ConfigError(f"{type(prepared).__name__} is not a noised release: it has no law to audit.")


def is_gaussian(events: Sequence[Event]) -> bool:
    """Whether all noise is Gaussian: then its trade-off curve is known up to one number."""
    return all(isinstance(e, GaussianEvent) for e in events)


def claimed(events: Sequence[Event], delta: float) -> tuple[float, float]:
    """(epsilon, delta) that the events are charged for; a pure release promises its epsilon at delta = 0."""
    from ..privacy.accountant import epsilon_of

    at = delta if needs_delta(events) else 0.0
    return epsilon_of(events, at), at
