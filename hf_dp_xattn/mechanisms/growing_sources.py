"""What is summed as a context grows, and what a noised sum is decoded to: kernel sums, learned sums of rows, histograms.

A source turns an append's private rows into ONE exact integer vector, the sum of its units' clipped contributions (each module's own proof
of sensitivity), and a noised prefix sum into what queries read (post-processing).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from ..errors import ConfigError
from ..privacy.units import NeighboringRelation, sensitivity_factor
from .anchors.anchors import SumSource, pool
from .anchors.histogram import PreparedHistogram
from .anchors.plan import AnchorPlan, Decoders
from .anchors.quantizer import RowQuantizer, check_context
from .context_rows import ContextRows
from .kernel_sum.contributions import check_rows, sum_rows, sum_units, unit_rows
from .kernel_sum.kernel_sum import PreparedKernelSum, layer_structure
from .kernel_sum.sketch import sum_sketch
from .structure import AttentionStructure


@dataclass(frozen=True, eq=False, repr=False)
class LayerRows:
    """One append's private keys [H, n, d] and values [H, n, dv], a layer each."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]


Private = LayerRows | torch.Tensor  # keys and values, or rows [n, C] of context space
Content = tuple[AttentionStructure, ...] | ContextRows  # what queries read


def count_rows(private: Private) -> int:
    """The number of rows of an append."""
    if isinstance(private, LayerRows):
        return private.keys[0].shape[-2] if len(private.keys) else 0
    return private.shape[0] if private.ndim == 2 else 0


def layers_of(private: Private) -> LayerRows:
    if not isinstance(private, LayerRows):
        raise ConfigError("This release takes keys and values: append LayerRows(keys, values), a layer each.")
    return private


def rows_of(private: Private, channels: int, neighboring: str) -> torch.Tensor:
    """Raises ConfigError, ContextError, see `check_context`."""
    if isinstance(private, LayerRows):
        raise ConfigError("This release takes rows of the context [n, C], not keys and values.")
    check_context(private, channels, may_be_empty=may_be_empty(neighboring))
    return private


def may_be_empty(neighboring: str) -> bool:
    """Where the number of rows is private, an append without rows must give a state, not an error."""
    return NeighboringRelation(neighboring) is NeighboringRelation.ADD_OR_REMOVE_ONE


@dataclass(frozen=True, eq=False)
class State:
    """A noised total in lattice units and the standard deviation of its noise; how many rows and units it is of, None where the
    neighbouring relation makes that private."""

    total: torch.Tensor
    deviation: float
    rows: int | None
    units: int | None


class Source(Protocol):
    """Everything public is fixed. The vectors have `size` numbers on the lattice 2^-exponent; one unit changes the one that it enters by
    at most `sensitivity` lattice units (l2, neighbouring factor included)."""

    @property
    def size(self) -> int: ...

    @property
    def sensitivity(self) -> int: ...

    @property
    def exponent(self) -> int: ...

    @property
    def clip_norm(self) -> float: ...

    def exact(self, private: Private, groups: torch.Tensor | None) -> torch.Tensor:
        """int64 [size] (CPU): the sum of the units' contributions. PRIVATE.

        Raises:
            ConfigError, ContextError: bad rows or groups.
        """
        ...

    def current(self, state: State) -> Content:
        """Post-processing."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True, eq=False)
class KernelSource:
    """`kernel_sum`: sum_i phi(k_i) [v_i; 1]^T over all layers and heads, or its public linear sketch."""

    prepared: PreparedKernelSum

    @property
    def size(self) -> int:
        p = self.prepared
        return sum(e.size for e in p.encoders) if p.sketch is None else p.sketch.rank

    @property
    def sensitivity(self) -> int:
        return sensitivity_factor(self.prepared.config.neighboring) * self.prepared.bound

    @property
    def exponent(self) -> int:
        return self.prepared.exponent

    @property
    def clip_norm(self) -> float:
        return self.prepared.clip_norm

    def exact(self, private: Private, groups: torch.Tensor | None) -> torch.Tensor:
        p, rows = self.prepared, layers_of(private)
        if count_rows(rows) == 0 and may_be_empty(p.config.neighboring):
            return torch.zeros(self.size, dtype=torch.int64)
        n = check_rows(rows.keys, rows.values, p.encoders)
        if p.sketch is not None:
            units = unit_rows(p.config.unit, n, groups)
            return sum_sketch(p.encoders, rows.keys, rows.values, p.bound, units, p.sketch).cpu()
        if p.config.unit == "row":
            totals = sum_rows(p.encoders, rows.keys, rows.values, p.bound)
        else:
            units = unit_rows(p.config.unit, n, groups)
            totals = sum_units(p.encoders, rows.keys, rows.values, p.bound, units)
        return torch.cat([t.flatten().cpu() for t in totals])

    def current(self, state: State) -> tuple[AttentionStructure, ...]:
        p, scale = self.prepared, 2.0**-self.exponent
        noised = state.total * scale
        if p.sketch is None:
            parts = noised.split([e.size for e in p.encoders])
            shapes = [(e.geometry.heads, e.features.size, e.geometry.value_dim + 1) for e in p.encoders]
            sums = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        else:
            assert state.units is not None  # see `grow`
            sums = p.sketch.reconstruct(noised, state.units, state.deviation * scale)
        rows = state.rows if p.config.unit == "row" else None
        floor = p.config.normalizer_floor
        return tuple(layer_structure(e, s, rows, floor) for e, s in zip(p.encoders, sums, strict=True))

    def describe(self) -> str:
        p = self.prepared
        return f"each {p.config.unit}'s joint contribution over {len(p.encoders)} layer(s), all heads, channels and the normaliser"


@dataclass(frozen=True, eq=False)
class LearnedSumSource:
    """`anchors`, release "sum": the image of each unit's mean row in the unit ball. units: how many the decoder's public contexts had."""

    source: SumSource
    plan: AnchorPlan
    decoders: Decoders
    units: int

    @property
    def size(self) -> int:
        return self.source.prepared.row_sum.size

    @property
    def sensitivity(self) -> int:
        return sensitivity_factor(self.source.prepared.neighboring) * self.source.prepared.bound

    @property
    def exponent(self) -> int:
        return self.source.prepared.exponent

    @property
    def clip_norm(self) -> float:
        return self.source.numbers[0]

    def exact(self, private: Private, groups: torch.Tensor | None) -> torch.Tensor:
        rows = rows_of(private, self.plan.center.shape[0], self.source.prepared.neighboring)
        return self.source.prepared.exact_sums(pool(rows, self.source.unit, groups)).cpu()

    def current(self, state: State) -> ContextRows:
        ratio = mean_ratio(self.units, state.units)
        variance = Fraction(state.deviation * ratio) ** 2
        prepared = dataclasses.replace(self.source.prepared, sigma_squared=variance)
        code = state.total * (ratio * 2.0**-self.exponent)
        decoded = SumSource(prepared, self.source.unit).decode(code, self.plan, self.decoders)
        return weighted(decoded, ratio)

    def describe(self) -> str:
        unit = self.source.unit
        what = "row" if unit == "row" else f"{unit}'s mean row"
        return f"the image of each {what} under a public map into R^{self.size}"


def mean_ratio(trained: int, units: int | None) -> float:
    """What a total is multiplied by before a decoder reads it that was trained on contexts of `trained` units: it is shown the mean.
    1 where the number of units is private."""
    return 1.0 if units is None else trained / units


def weighted(rows: ContextRows, ratio: float) -> ContextRows:
    """Undoes `mean_ratio` in the rows' weights, so that they stand for all units beside public rows."""
    return ContextRows(rows.rows, rows.log_weights - math.log(ratio)).pruned()


@dataclass(frozen=True, eq=False)
class CellSource:
    """`anchors`, release "histogram": counts of public cells, here with Gaussian noise (histogram.py).

    *Decoder.* With p the public mean share of each cell, n the number of rows and s the noise's deviation, a count has the prior mean n p
    and variance n p (Poisson); its linear posterior mean is n p + n p / (n p + s^2) (y - n p), clamped at 0. Where n is private, the sum
    of the noised counts stands for it.
    """

    prepared: PreparedHistogram
    sensitivity: int
    quantizer: RowQuantizer
    decoders: Decoders

    @property
    def size(self) -> int:
        return self.prepared.cells

    @property
    def exponent(self) -> int:
        return self.prepared.exponent

    @property
    def clip_norm(self) -> float:
        return self.prepared.bound * 2.0**-self.exponent

    def exact(self, private: Private, groups: torch.Tensor | None) -> torch.Tensor:
        rows = rows_of(private, self.quantizer.projection.channels, self.prepared.neighboring)
        return self.prepared.exact_sums(self.quantizer.cells(rows), groups).cpu()

    def current(self, state: State) -> ContextRows:
        cells = self.decoders.cells
        if cells is None:
            raise ConfigError("The calibration holds no anchors for this plan; calibrate again.")
        y = state.total * 2.0**-self.exponent
        prior = cells.log_prior.to(torch.float64).softmax(-1) @ cells.support.to(torch.float64)
        n = float(y.sum().clamp_min(1.0)) if state.rows is None else float(state.rows)
        mean = n * prior / prior.sum()
        variance = (state.deviation * 2.0**-self.exponent) ** 2
        weights = mean + mean / (mean + variance) * (y - mean)
        return cells.decode(weights.clamp_min(0.0).to(torch.float32)).pruned()

    def describe(self) -> str:
        return f"each {self.prepared.unit.value}'s counts in {self.size} public cells"
