"""What `anchors` releases by each kind of plan: a learned sum, answers for cells, or counts of cells. Mixed: `mixed.py`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.accountant import Event, GaussianEvent
from ...privacy.additive import GaussianNoise, GeometricNoise
from ...privacy.response import RandomizedResponse
from ...privacy.units import sensitivity_factor
from ..base import Answers, GuaranteeNumbers, Integers, NoisePart, State, Summand
from ..context_rows import ContextRows
from ..inputs import units_of_rows
from .cells import CellDecoder
from .fallback import drawn
from .histogram import PreparedHistogram, prepare_gaussian
from .plan import AnchorPlan, Decoders
from .quantizer import RowQuantizer
from .row_sum import PreparedRowSum, RowSum

_POOL_BITS = 24
_POOL_LIMIT = 2**38


class Source(ABC):
    """One kind of release of rows [n, C]: everything public is fixed."""

    unit: str

    @property
    @abstractmethod
    def parts(self) -> tuple[NoisePart, ...]:
        """The noise of each tensor of `exact`, in order."""

    @property
    def events(self) -> tuple[Event, ...]:
        return tuple(event for part in self.parts for event in part.events)

    @abstractmethod
    def exact(self, rows: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """PRIVATE integers, see `base.Exact`."""

    @abstractmethod
    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        """Noised integers as one float code, of `rows` rows where that number is public. Post-processing."""

    def decode(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        """The plan's rows, drawn towards its fall-back. Post-processing."""
        return drawn(self.decoded(code, plan, decoders), plan.worth, decoders.fallback)

    @abstractmethod
    def decoded(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        """What the plan's own decoder makes of the code. Post-processing."""

    @property
    @abstractmethod
    def numbers(self) -> GuaranteeNumbers:
        """For the guarantee; `clipping` says what is released."""

    @property
    @abstractmethod
    def noise_numbers(self) -> dict[str, float]:
        """The noise in a planner's words."""

    @abstractmethod
    def growing(
        self, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders, units: int | None
    ) -> Summand | Answers[torch.Tensor]:
        """How it is released as a context grows. Raises ConfigError where it cannot."""

    @property
    def what(self) -> str:
        return "row" if self.unit == "row" else f"{self.unit}'s mean row"


def pool(rows: torch.Tensor, unit: str, groups: torch.Tensor | None) -> torch.Tensor:
    """[n, C] -> [U, C] float64: each unit's mean row, in the order of the groups' numbers.

    Sums are exact integers (steps of 2^-24), so a unit's mean depends on its own rows alone, bit for bit.
    """
    owner = units_of_rows(unit, rows.shape[0], groups)
    if owner is None:
        return rows.to(torch.float64)
    owner = owner.to(rows.device)
    count = torch.bincount(owner)
    integers = (
        torch.round(rows.to(torch.float64) * 2.0**_POOL_BITS).clamp(-_POOL_LIMIT, _POOL_LIMIT).to(torch.int64)
    )
    total = torch.zeros(len(count), rows.shape[1], dtype=torch.int64, device=rows.device)
    total.index_add_(0, owner, integers)
    return total.to(torch.float64) / count.unsqueeze(1) * 2.0**-_POOL_BITS


def _decode_slots(code: torch.Tensor, trust: float, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
    """trust < 1 draws the code to its public mean: for an epsilon below the plan's, whose noise the decoder has not seen."""
    if decoders.slots is None or plan.head is None:
        raise ConfigError("The calibration holds no slot decoder for this plan; calibrate again.")
    center = plan.head.center.to(code.device, code.dtype)
    return decoders.slots.decode(center + (code - center) * min(1.0, trust), plan.head)


def known_units(units: int | None) -> int:
    """How many units the calibration's public contexts had. Raises ConfigError where that is not given."""
    if units is None or units < 1:
        raise ConfigError("`units` is needed: how many units the calibration's public contexts had.")
    return units


def mean_ratio(trained: int, units: int | None) -> float:
    """What a total is multiplied by before a decoder reads it that was trained on contexts of `trained` units: it is shown the mean.
    1 where the number of units is private."""
    return 1.0 if units is None else trained / units


def weighted(rows: ContextRows, ratio: float) -> ContextRows:
    """Undoes `mean_ratio` in the rows' weights, so that they stand for all units beside public rows."""
    return ContextRows(rows.rows, rows.log_weights - math.log(ratio)).pruned()


@dataclass(frozen=True, eq=False)
class SumSource(Source):
    """Release B on units' mean rows."""

    prepared: PreparedRowSum
    unit: str

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(GaussianNoise(self.prepared.sigma_squared), self.prepared.events, 1),)

    def exact(self, rows: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(pool(rows, self.unit, groups)),)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        return self.prepared.real(noised[0])

    def decoded(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        return _decode_slots(code, (plan.noise / self.prepared.sigma) ** 2, plan, decoders)

    @property
    def numbers(self) -> GuaranteeNumbers:
        step, p = 2.0**-self.prepared.exponent, self.prepared
        return GuaranteeNumbers(
            p.bound * step,
            sensitivity_factor(p.neighboring) * p.bound * step,
            p.sigma,
            f"each {self.what} is mapped by a public map into the unit ball of R^{p.row_sum.size}; their exact sum is released with "
            f"discrete Gaussian noise of standard deviation {p.sigma:.4g}, once for all layers and heads",
        )

    @property
    def noise_numbers(self) -> dict[str, float]:
        return {"sigma": self.prepared.sigma}

    def growing(
        self, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders, units: int | None
    ) -> LearnedSum:
        return LearnedSum(self, plan, decoders, known_units(units))


@dataclass(frozen=True, eq=False)
class LearnedSum:
    """`SumSource` as a context grows. units: how many the decoder's public contexts had."""

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
        return self.source.numbers.clip_norm

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return self.source.exact(private, groups)

    def decode(self, noised: Integers, state: State) -> ContextRows:
        assert state.deviation is not None
        ratio, step = mean_ratio(self.units, state.units), 2.0**-self.exponent
        trust = (self.plan.noise / (state.deviation * ratio * step)) ** 2
        found = _decode_slots(noised[0] * (ratio * step), trust, self.plan, self.decoders)
        return weighted(drawn(found, self.plan.worth, self.decoders.fallback), ratio)

    def describe(self) -> str:
        return f"the image of each {self.source.what} under a public map into R^{self.size}"


@dataclass(frozen=True, eq=False)
class ResponseSource(Source):
    """k-ary randomised response of each unit's cell in each codebook; the code is the sum of the answers' codes."""

    response: RandomizedResponse
    encoder: RowSum
    quantizers: tuple[RowQuantizer, ...]
    codes: torch.Tensor
    unit: str

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        stages = len(self.quantizers)
        return (NoisePart(self.response, (self.response.event,) * stages, stages),)

    def exact(self, rows: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """Each unit's cell in each codebook, int64 [U]. A function of each unit alone, as every step of it is."""
        rest = self.encoder.features(pool(rows, self.unit, groups))
        cells: list[torch.Tensor] = []
        for i, quantizer in enumerate(self.quantizers):
            cells.append(quantizer.cells(rest))
            if i + 1 < len(self.quantizers):
                lattice = quantizer.codes.to(rest.device) * 2.0**-quantizer.exponent
                rest = quantizer.project(rest) - lattice[cells[-1]]
        return tuple(cells)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        total = self.codes.new_zeros(self.codes.shape[-1])
        for answers, codes in zip(noised, self.codes, strict=True):
            total = total + codes[answers].sum(0)
        return total

    def decoded(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        return _decode_slots(code, (self.response.truth / plan.noise) ** 2, plan, decoders)

    @property
    def numbers(self) -> GuaranteeNumbers:
        return GuaranteeNumbers(
            1.0,
            1.0,
            0.0,
            f"each {self.what} falls into one of {self.response.alphabet} cells in each of {len(self.quantizers)} public codebook(s), and "
            f"k-ary randomised response names that cell with probability {self.response.truth:.4g} and any other one otherwise (pure "
            "epsilon; delta is not used)",
        )

    @property
    def noise_numbers(self) -> dict[str, float]:
        return {
            "truth": self.response.truth,
            "cells": self.response.alphabet,
            "codebooks": len(self.quantizers),
        }

    def growing(
        self, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders, units: int | None
    ) -> CellAnswers:
        return CellAnswers(self, plan, decoders, known_units(units))


@dataclass(frozen=True, eq=False)
class CellAnswers(Answers[torch.Tensor]):
    """`ResponseSource` as a context grows. units: how many the decoder's public contexts had."""

    source: ResponseSource
    plan: AnchorPlan
    decoders: Decoders
    units: int

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return self.source.parts

    @property
    def numbers(self) -> GuaranteeNumbers:
        return self.source.numbers

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return self.source.exact(private, groups)

    def join(self, total: Integers, noised: Integers) -> Integers:
        """The sum of the answers' codes."""
        code = self.source.code(noised, None)
        return (code + total[0] if total else code,)

    def decode(self, noised: Integers, state: State) -> ContextRows:
        ratio = mean_ratio(self.units, state.units)
        return weighted(self.source.decode(noised[0] * ratio, self.plan, self.decoders), ratio)


@dataclass(frozen=True, eq=False)
class HistogramSource(Source):
    """Releases A and C: noised counts of the public cells that units fall into, by their mean rows."""

    prepared: PreparedHistogram
    quantizer: RowQuantizer
    noise: GeometricNoise
    unit: str = "row"

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (NoisePart(self.noise, self.prepared.events, 1),)

    @property
    def rates(self) -> tuple[float, float]:
        """(e_plus, e_minus) per row."""
        scale = 2.0**self.prepared.exponent
        return float(self.noise.rate_plus) * scale, float(self.noise.rate_minus) * scale

    def exact(self, rows: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(self.quantizer.cells(pool(rows, self.unit, groups))),)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        return self.prepared.counts(noised[0])

    def decoded(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        if decoders.cells is None:
            raise ConfigError("The calibration holds no anchors for this plan; calibrate again.")
        return decoders.cells.decode(self.weights(code, plan, decoders.cells))

    def weights(self, code: torch.Tensor, plan: AnchorPlan, cells: CellDecoder) -> torch.Tensor:
        """Posterior mean counts [m] of noised counts [m]."""
        return cells.weights(code.cpu().float(), self.rates, plan.codes[0], plan.tilt)

    @property
    def numbers(self) -> GuaranteeNumbers:
        bound = self.prepared.bound * 2.0**-self.prepared.exponent
        plus, minus = self.rates
        where = "" if self.unit == "row" else f", into one of which each {self.unit} falls by its mean row,"
        return GuaranteeNumbers(
            bound,
            sensitivity_factor(self.prepared.neighboring) * bound,
            0.0,
            f"the counts of {self.prepared.cells} public cells{where} with two-sided geometric noise (rates {plus:.4g} up, {minus:.4g} "
            "down) (pure epsilon; delta is not used)",
        )

    @property
    def noise_numbers(self) -> dict[str, float]:
        plus, minus = self.rates
        return {"rate_plus": plus, "rate_minus": minus, "cells": self.prepared.cells}

    def growing(
        self, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders, units: int | None
    ) -> CellCounts:
        counts = prepare_gaussian(
            config.epsilon,
            config.delta,
            cells=self.prepared.cells,
            unit=config.unit,
            neighboring=config.neighboring,
            group_bound=1 if config.unit == "row" else plan.bound,
        )
        return CellCounts(counts, self.quantizer, plan, decoders)


@dataclass(frozen=True, eq=False)
class CellCounts:
    """Counts of public cells as a context grows, with Gaussian noise (histogram.py) and each row in its own cell.

    *Decoder.* With p the public mean share of each cell, n the number of rows and s the noise's deviation, a count has the prior mean n p
    and variance n p (Poisson); its linear posterior mean is n p + n p / (n p + s^2) (y - n p), clamped at 0. Where n is private, the sum
    of the noised counts stands for it.
    """

    prepared: PreparedHistogram
    quantizer: RowQuantizer
    plan: AnchorPlan
    decoders: Decoders

    @property
    def size(self) -> int:
        return self.prepared.cells

    @property
    def sensitivity(self) -> int:
        (event,) = self.prepared.events
        assert isinstance(event, GaussianEvent)
        return event.sensitivity

    @property
    def exponent(self) -> int:
        return self.prepared.exponent

    @property
    def clip_norm(self) -> float:
        return self.prepared.bound * 2.0**-self.exponent

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(self.quantizer.cells(private), groups),)

    def decode(self, noised: Integers, state: State) -> ContextRows:
        cells = self.decoders.cells
        if cells is None:
            raise ConfigError("The calibration holds no anchors for this plan; calibrate again.")
        assert state.deviation is not None
        y = noised[0] * 2.0**-self.exponent
        prior = cells.log_prior.to(torch.float64).softmax(-1) @ cells.support.to(torch.float64)
        n = float(y.sum().clamp_min(1.0)) if state.rows is None else float(state.rows)
        mean = n * prior / prior.sum()
        variance = (state.deviation * 2.0**-self.exponent) ** 2
        weights = mean + mean / (mean + variance) * (y - mean)
        found = cells.decode(weights.clamp_min(0.0).to(torch.float32))
        return drawn(found, self.plan.worth, self.decoders.fallback).pruned()

    def describe(self) -> str:
        return f"each {self.prepared.unit.value}'s counts in {self.size} public cells"
