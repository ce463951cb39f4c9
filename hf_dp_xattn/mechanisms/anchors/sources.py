"""What `anchors` releases by each kind of plan: a learned sum, answers for cells, or counts of cells. Mixed: `mixed.py`."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.additive import GeometricNoise
from ...privacy.response import RandomizedResponse
from ...privacy.units import NeighboringRelation, sensitivity_factor
from ..base import GuaranteeNumbers, Integers, Mechanism, NoisePart, State, Summed
from ..context_rows import ContextRows
from ..inputs import check_context, check_groups, rows_of, units_of_rows
from .cells import CellDecoder
from .fallback import drawn
from .histogram import PreparedHistogram, prepare_gaussian, prepare_geometric
from .plan import AnchorPlan, Decoders
from .quantizer import RowQuantizer
from .row_sum import PreparedRowSum, RowSum

_POOL_BITS = 24
_POOL_LIMIT = 2**38


@dataclass(frozen=True, eq=False)
class PreparedAnchors(Mechanism[torch.Tensor]):
    """A release of rows [n, C] of which everything public is fixed, of the kind that its plan chose.

    trained: of a context that grows: how many units the decoder's public contexts had. It is shown the mean: a total is brought to as many
    units, where their number is public, and the rows' weights are brought back, so that they stand for all units beside public rows.
    """

    config: DPXAttnConfig
    plan: AnchorPlan
    decoders: Decoders
    trained: int | None = field(default=None, kw_only=True)

    @classmethod
    @abstractmethod
    def of(cls, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders) -> Self:
        """What is released at config.epsilon by a plan of this kind.

        Raises:
            ConfigError: it cannot give this unit or neighbouring relation.
        """

    @property
    @abstractmethod
    def leaves(self) -> GuaranteeNumbers:
        """`numbers`; `clipping` says what is released, and nothing of the public box."""

    @property
    @abstractmethod
    def noise_numbers(self) -> dict[str, float]:
        """The noise in a planner's words."""

    @abstractmethod
    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        """Noised integers as one float code, of `rows` rows where that number is public. Post-processing."""

    @abstractmethod
    def decoded(self, code: torch.Tensor, deviation: float | None = None) -> ContextRows:
        """What the plan's own decoder makes of a code. Post-processing. deviation: of its noise, in lattice steps; None: the release's."""

    @property
    def numbers(self) -> GuaranteeNumbers:
        if self.trained is not None:
            return self.leaves
        public_box = "coordinates of rows are first clamped to a public box around the calibration's centre"
        return dataclasses.replace(self.leaves, clipping=f"{self.leaves.clipping}; {public_box}")

    def count(self, private: torch.Tensor, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        n = check_context(rows_of(private), self.plan.center.shape[0], may_be_empty=empty)
        check_groups(self.config.unit, n, groups)
        return n

    def decode(self, noised: Integers, state: State) -> ContextRows:
        """The plan's rows, drawn towards its fall-back; or that, where the release is unlike public ones."""
        ratio = 1.0 if self.trained is None or state.units is None else self.trained / state.units
        deviation = None if state.deviation is None else state.deviation * ratio
        code = self.code(noised, state.rows) * ratio
        rows = self.drawn(self.decoded(code, deviation), self.familiar(code, deviation))
        return ContextRows(rows.rows, rows.log_weights - math.log(ratio)).pruned()

    def drawn(self, rows: ContextRows, familiar: bool = True) -> ContextRows:
        worth = self.plan.worth
        if worth is not None and not familiar:
            worth = dataclasses.replace(worth, weight=0.0)
        return drawn(rows, worth, self.decoders.fallback)

    def familiar(self, code: torch.Tensor, deviation: float | None = None) -> bool:
        """Whether a code is like those of public contexts, as far as the plan can tell. Post-processing.

        Args:
            code: as `code` gives it.
            deviation: of its noise, in lattice steps; None: the release's.
        """
        likeness = self.plan.likeness
        return likeness is None or likeness.holds(self.features(code), self.noise_ratio(deviation))

    def features(self, code: torch.Tensor) -> torch.Tensor:
        """What `Likeness` reads of a code: [F] float32 on the CPU. Post-processing."""
        return code.to("cpu", torch.float32)

    def noise_ratio(self, deviation: float | None = None) -> float:
        """The variance of this noise over that which the plan was fitted with."""
        return 1.0

    def from_slots(self, code: torch.Tensor, trust: float) -> ContextRows:
        """trust < 1 draws the code to its public mean: for an epsilon below the plan's, whose noise the decoder has not seen."""
        if self.decoders.slots is None or self.plan.head is None:
            raise ConfigError("The calibration holds no slot decoder for this plan; calibrate again.")
        center = self.plan.head.center.to(code.device, code.dtype)
        return self.decoders.slots.decode(center + (code - center) * min(1.0, trust), self.plan.head)

    def growing(self, units: int | None) -> PreparedAnchors:
        if units is None or units < 1:
            raise ConfigError("`units` is needed: how many units the calibration's public contexts had.")
        return dataclasses.replace(self, trained=units)

    def at(self, config: DPXAttnConfig) -> PreparedAnchors:
        return self.of(config, self.plan, self.decoders)

    def canaries(self, count: int, rows: int, generator: torch.Generator) -> list[torch.Tensor]:
        """Corners of the public box, along the directions that the public map stretches most and its opposite ones, and random rows."""
        center, reach = self.plan.center.double(), self.plan.reach.double()
        directions = torch.linalg.svd(self.plan.matrix.double() * reach, full_matrices=False).Vh[: count // 4]
        corners = [center + sign * reach * d.sign() for d in directions for sign in (1.0, -1.0)]
        random = torch.randn(count // 2, len(center), generator=generator, dtype=torch.float64)
        corners += [center + reach * r for r in random]
        return [c.expand(rows, -1).float() for c in corners]

    def bystander(self) -> torch.Tensor:
        return self.plan.center.float().unsqueeze(0)

    @property
    def what(self) -> str:
        return "row" if self.config.unit == "row" else f"{self.config.unit}'s mean row"


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


@dataclass(frozen=True, eq=False)
class AnchorSum(PreparedAnchors):
    """Release B on units' mean rows."""

    additive = True
    prepared: PreparedRowSum

    @classmethod
    def of(cls, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders) -> AnchorSum:
        # a pooled unit is one row to the sum: the sensitivity of one unit is that of one row
        prepared = plan.encoder().prepare(config.epsilon, config.delta, neighboring=config.neighboring)
        return cls(config, plan, decoders, prepared)

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (self.prepared.part,)

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(pool(private, self.config.unit, groups)),)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        return self.prepared.real(noised[0])

    def decoded(self, code: torch.Tensor, deviation: float | None = None) -> ContextRows:
        return self.from_slots(code, 1.0 / self.noise_ratio(deviation))

    def noise_ratio(self, deviation: float | None = None) -> float:
        sigma = self.prepared.sigma if deviation is None else deviation * 2.0**-self.prepared.exponent
        return (sigma / self.plan.noise) ** 2

    @property
    def leaves(self) -> GuaranteeNumbers:
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

    @property
    def summed(self) -> Summed:
        p = self.prepared
        what = f"the image of each {self.what} under a public map into R^{p.row_sum.size}"
        sensitivity = sensitivity_factor(p.neighboring) * p.bound
        return Summed(p.row_sum.size, sensitivity, p.exponent, p.bound * 2.0**-p.exponent, what)


@dataclass(frozen=True, eq=False)
class AnchorResponse(PreparedAnchors):
    """k-ary randomised response of each unit's cell in each codebook; the code is the sum of the answers' codes."""

    response: RandomizedResponse
    encoder: RowSum
    quantizers: tuple[RowQuantizer, ...]

    @classmethod
    def of(cls, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders) -> AnchorResponse:
        if config.neighboring != NeighboringRelation.REPLACE_ONE.value:
            raise ConfigError(
                "This calibration answers by randomised response, once for each unit, so the number of units is public: it cannot give "
                "neighboring='add_or_remove_one'. Use replace_one, or calibrate with releases=('sum',)."
            )
        stages, alphabet, width = plan.codes.shape
        response = RandomizedResponse.of(Fraction(config.epsilon) / stages, alphabet)
        identity, span = torch.eye(width), 2.0 + 4.0 * float(plan.codes.abs().max())
        quantizers = tuple(
            RowQuantizer.from_tensors(torch.zeros(width), identity, codes, reach=span) for codes in plan.codes
        )
        return cls(config, plan, decoders, response, plan.encoder(), quantizers)

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        stages = len(self.quantizers)
        return (NoisePart(self.response, (self.response.event,) * stages, stages),)

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """Each unit's cell in each codebook, int64 [U]. A function of each unit alone, as every step of it is."""
        rest = self.encoder.features(pool(private, self.config.unit, groups))
        cells: list[torch.Tensor] = []
        for i, quantizer in enumerate(self.quantizers):
            cells.append(quantizer.cells(rest))
            if i + 1 < len(self.quantizers):
                lattice = quantizer.codes.to(rest.device) * 2.0**-quantizer.exponent
                rest = quantizer.project(rest) - lattice[cells[-1]]
        return tuple(cells)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        if noised[0].is_floating_point():  # joined
            return noised[0]
        total = self.plan.codes.new_zeros(self.plan.codes.shape[-1])
        for answers, codes in zip(noised, self.plan.codes, strict=True):
            total = total + codes[answers].sum(0)
        return total

    def join(self, total: Integers, noised: Integers) -> Integers:
        """The sum of the answers' codes."""
        code = self.code(noised, None)
        return (code + total[0] if total else code,)

    def decoded(self, code: torch.Tensor, deviation: float | None = None) -> ContextRows:
        return self.from_slots(code, (self.response.truth / self.plan.noise) ** 2)

    def familiar(self, code: torch.Tensor, deviation: float | None = None) -> bool:
        # while a context grows, its answers are not as many as those of public contexts
        return self.trained is not None or super().familiar(code, deviation)

    @property
    def leaves(self) -> GuaranteeNumbers:
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


@dataclass(frozen=True, eq=False)
class AnchorHistogram(PreparedAnchors):
    """Releases A and C: noised counts of the public cells that units fall into, by their mean rows."""

    additive = True
    prepared: PreparedHistogram
    quantizer: RowQuantizer

    @classmethod
    def of(
        cls,
        config: DPXAttnConfig,
        plan: AnchorPlan,
        decoders: Decoders,
        share: Fraction = Fraction(1),
    ) -> AnchorHistogram:
        """share: of epsilon."""
        quantizer = RowQuantizer.from_tensors(
            plan.center, plan.matrix.mT, plan.codes[0] - plan.bias, reach=plan.reach
        )
        symmetric = config.neighboring != NeighboringRelation.REPLACE_ONE.value
        histogram = prepare_geometric(
            Fraction(config.epsilon) * share,
            cells=plan.codes.shape[1],
            unit="row",  # a pooled unit is one row to it
            neighboring=config.neighboring,
            share_plus=Fraction(1, 2) if symmetric else Fraction(plan.share_plus),
        )
        return cls(config, plan, decoders, histogram, quantizer)

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (self.prepared.part,)

    @property
    def rates(self) -> tuple[float, float]:
        """(e_plus, e_minus) per row."""
        noise, scale = self.prepared.noise, 2.0**self.prepared.exponent
        assert isinstance(noise, GeometricNoise)
        return float(noise.rate_plus) * scale, float(noise.rate_minus) * scale

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(self.quantizer.cells(pool(private, self.config.unit, groups))),)

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        return self.prepared.counts(noised[0])

    def decoded(self, code: torch.Tensor, deviation: float | None = None) -> ContextRows:
        return self.cells().decode(self.weights(code))

    def features(self, code: torch.Tensor) -> torch.Tensor:
        """The codes of the cells, summed by their posterior mean counts (without a tilt, which brings any release to a public topic)."""
        codes = self.plan.codes[0]
        return self.cells().weights(code.cpu().float(), self.rates, codes) @ codes

    def weights(self, code: torch.Tensor) -> torch.Tensor:
        """Posterior mean counts [m] of noised counts [m]."""
        return self.cells().weights(code.cpu().float(), self.rates, self.plan.codes[0], self.plan.tilt)

    def cells(self) -> CellDecoder:
        if self.decoders.cells is None:
            raise ConfigError("The calibration holds no anchors for this plan; calibrate again.")
        return self.decoders.cells

    @property
    def leaves(self) -> GuaranteeNumbers:
        bound = self.prepared.bound * 2.0**-self.prepared.exponent
        plus, minus = self.rates
        unit = self.config.unit
        where = "" if unit == "row" else f", into one of which each {unit} falls by its mean row,"
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

    def growing(self, units: int | None) -> AnchorCounts:
        config = self.config
        counts = prepare_gaussian(
            config.epsilon,
            config.delta,
            cells=self.prepared.cells,
            unit=config.unit,
            neighboring=config.neighboring,
            group_bound=1 if config.unit == "row" else self.plan.bound,
        )
        return AnchorCounts(config, self.plan, self.decoders, counts, self.quantizer)


class AnchorCounts(AnchorHistogram):
    """Counts of public cells as a context grows, with Gaussian noise (histogram.py) and each row in its own cell.

    *Decoder.* With p the public mean share of each cell, n the number of rows and s the noise's deviation, a count has the prior mean n p
    and variance n p (Poisson); its linear posterior mean is n p + n p / (n p + s^2) (y - n p), clamped at 0. Where n is private, the sum
    of the noised counts stands for it.
    """

    @property
    def summed(self) -> Summed:
        return self.prepared.summed(f"each {self.config.unit}'s counts in {self.prepared.cells} public cells")

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (self.prepared.exact_sums(self.quantizer.cells(private), groups),)

    def decode(self, noised: Integers, state: State) -> ContextRows:
        assert state.deviation is not None
        cells, y = self.cells(), self.prepared.counts(noised[0])
        prior = cells.log_prior.to(torch.float64).softmax(-1) @ cells.support.to(torch.float64)
        n = float(y.sum().clamp_min(1.0)) if state.rows is None else float(state.rows)
        mean = n * prior / prior.sum()
        variance = (state.deviation * 2.0**-self.prepared.exponent) ** 2
        weights = mean + mean / (mean + variance) * (y - mean)
        return self.drawn(cells.decode(weights.clamp_min(0.0).to(torch.float32))).pruned()
