r"""`anchors`: one release of the context's rows for all layers and heads, decoded to a few rows that ordinary attention reads.

*Source.* Ours; for each epsilon the calibration chose one of

* **sum** (B): y = sum_u f(x_u) + N_Z(0, sigma^2 I), `row_sum.py`;
* **response**: each unit's cell by k-ary randomised response, `privacy/response.py`; with S codebooks (the second one quantises what the
  first left over, and so on) it answers S times at epsilon / S each, by basic composition;
* **histogram** (A, C): counts over public cells with geometric noise, `histogram.py`;
* **mixed**: such counts, and a sum beside them, `mixed.py`.

*Formal guarantee.* **Released:** that y, and nothing else. **Unit:** a row; or a group or the context, which enters as ONE row, the
mean of its rows (an exact function of the unit alone, `pool`); `mixed` is for rows. **Neighbouring relation:** replace_one, or
add_or_remove_one for sum and histogram (`response` answers once for each unit and `mixed` reads a mean, so both need a public number of
units and are refused by name). **Sensitivity, noise, theorem:** stated in the modules. Decoding, pruning and all attention is
post-processing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.accountant import Event
from ...privacy.bits import Entropy, SystemEntropy
from ...privacy.noise import sampling_distance
from ...privacy.response import RandomizedResponse
from ...privacy.units import NeighboringRelation, public_counts
from ...report import Guarantee
from ..context_rows import ContextRelease, ContextRows
from ..kernel_sum.contributions import check_groups
from .cells import CellDecoder
from .histogram import GeometricNoise, PreparedHistogram, prepare_geometric
from .mixed import HISTOGRAM_SHARE, check_mixed, prepare_mixed
from .plan import AnchorPlan, Decoders
from .quantizer import RowQuantizer, check_context
from .row_sum import PreparedRowSum, RowSum

NO_CALIBRATION = (
    "mechanism='anchors' needs a calibration: its codebook, encoder and decoder are fitted to PUBLIC contexts. Make one with "
    "dpx.calibrate(pipe, public_contexts, config), or load a shared one with dpx.Calibration.from_pretrained(...)."
)
_POOL_BITS = 24
_POOL_LIMIT = 2**38


class Source(Protocol):
    """One kind of release: everything public is fixed, `code` is the private step."""

    @property
    def events(self) -> tuple[Event, ...]: ...

    def code(self, rows: torch.Tensor, groups: torch.Tensor | None, entropy: Entropy) -> torch.Tensor:
        """The released code y [K] (or noised counts [m]); DP."""
        ...

    def decode(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows: ...

    def describe(self) -> str: ...

    @property
    def numbers(self) -> tuple[float, float, float]:
        """(clip norm, sensitivity, sigma) for the guarantee's record."""
        ...


def pool(rows: torch.Tensor, unit: str, groups: torch.Tensor | None) -> torch.Tensor:
    """[n, C] -> [U, C] float64: each unit's mean row, in the order of the groups' numbers.

    Sums are exact integers (steps of 2^-24), so a unit's mean depends on its own rows alone, bit for bit.
    """
    if unit == "row":
        return rows.to(torch.float64)
    n = rows.shape[0]
    owner = (
        torch.zeros(n, dtype=torch.int64)
        if groups is None
        else torch.unique(groups.cpu(), return_inverse=True)[1]
    )
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


@dataclass(frozen=True, eq=False)
class SumSource:
    """Release B on units' mean rows."""

    prepared: PreparedRowSum
    unit: str

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    def code(self, rows: torch.Tensor, groups: torch.Tensor | None, entropy: Entropy) -> torch.Tensor:
        return self.prepared.release(pool(rows, self.unit, groups), entropy=entropy)

    def decode(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        return _decode_slots(code, (plan.noise / self.prepared.sigma) ** 2, plan, decoders)

    def describe(self) -> str:
        what = "row" if self.unit == "row" else f"{self.unit}'s mean row"
        return (
            f"each {what} is mapped by a public map into the unit ball of R^{self.prepared.row_sum.size}; their exact sum is released with "
            f"discrete Gaussian noise of standard deviation {self.prepared.sigma:.4g}, once for all layers and heads"
        )

    @property
    def numbers(self) -> tuple[float, float, float]:
        step = 2.0**-self.prepared.exponent
        factor = 2 if self.prepared.neighboring is NeighboringRelation.REPLACE_ONE else 1
        return self.prepared.bound * step, factor * self.prepared.bound * step, self.prepared.sigma


@dataclass(frozen=True, eq=False)
class ResponseSource:
    """k-ary randomised response of each unit's cell in each codebook; the code is the sum of the answers' codes."""

    response: RandomizedResponse
    encoder: RowSum
    quantizers: tuple[RowQuantizer, ...]
    codes: torch.Tensor
    unit: str

    @property
    def events(self) -> tuple[Event, ...]:
        return (self.response.event,) * len(self.quantizers)

    def code(self, rows: torch.Tensor, groups: torch.Tensor | None, entropy: Entropy) -> torch.Tensor:
        total = self.codes.new_zeros(self.codes.shape[-1])
        for cells, codes in zip(self.cells(rows, groups), self.codes, strict=True):
            answers = torch.from_numpy(self.response.draw(cells.cpu().numpy(), entropy))
            total = total + codes[answers].sum(0)
        return total

    def cells(self, rows: torch.Tensor, groups: torch.Tensor | None) -> list[torch.Tensor]:
        """Each unit's cell in each codebook, int64 [U]; private. A function of each unit alone, as every step of it is."""
        rest = self.encoder.features(pool(rows, self.unit, groups))
        found = []
        for i, quantizer in enumerate(self.quantizers):
            found.append(quantizer.cells(rest))
            if i + 1 < len(self.quantizers):
                lattice = quantizer.codes.to(rest.device) * 2.0**-quantizer.exponent
                rest = quantizer.project(rest) - lattice[found[-1]]
        return found

    def decode(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        return _decode_slots(code, (self.response.truth / plan.noise) ** 2, plan, decoders)

    def describe(self) -> str:
        what = "row" if self.unit == "row" else f"{self.unit}'s mean row"
        return (
            f"each {what} falls into one of {self.response.alphabet} cells in each of {len(self.quantizers)} public codebook(s), and k-ary "
            f"randomised response names that cell with probability {self.response.truth:.4g} and any other one otherwise (pure epsilon; "
            "delta is not used)"
        )

    @property
    def numbers(self) -> tuple[float, float, float]:
        return 1.0, 1.0, 0.0


@dataclass(frozen=True, eq=False)
class HistogramSource:
    """Releases A and C: noised counts of the public cells that units fall into, by their mean rows."""

    prepared: PreparedHistogram
    quantizer: RowQuantizer
    noise: GeometricNoise
    unit: str = "row"

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    @property
    def rates(self) -> tuple[float, float]:
        """(e_plus, e_minus) per row."""
        scale = 2.0**self.prepared.exponent
        return float(self.noise.rate_plus) * scale, float(self.noise.rate_minus) * scale

    def code(self, rows: torch.Tensor, groups: torch.Tensor | None, entropy: Entropy) -> torch.Tensor:
        cells = self.quantizer.cells(pool(rows, self.unit, groups))
        released = self.prepared.release(cells, entropy=entropy)
        return self.prepared.counts(released)

    def decode(self, code: torch.Tensor, plan: AnchorPlan, decoders: Decoders) -> ContextRows:
        if decoders.cells is None:
            raise ConfigError("The calibration holds no anchors for this plan; calibrate again.")
        return decoders.cells.decode(self.weights(code, plan, decoders.cells))

    def weights(self, code: torch.Tensor, plan: AnchorPlan, cells: CellDecoder) -> torch.Tensor:
        """Posterior mean counts [m] of noised counts [m]."""
        return cells.weights(code.cpu().float(), self.rates, plan.codes[0], plan.tilt)

    def describe(self) -> str:
        plus, minus = self.rates
        what = "" if self.unit == "row" else f", into one of which each {self.unit} falls by its mean row,"
        return (
            f"the counts of {self.prepared.cells} public cells{what} with two-sided geometric noise (rates {plus:.4g} up, {minus:.4g} "
            "down) (pure epsilon; delta is not used)"
        )

    @property
    def numbers(self) -> tuple[float, float, float]:
        bound = self.prepared.bound * 2.0**-self.prepared.exponent
        factor = 2 if self.prepared.neighboring is NeighboringRelation.REPLACE_ONE else 1
        return bound, factor * bound, 0.0


def prepare_source(plan: AnchorPlan, config: DPXAttnConfig, decoders: Decoders) -> Source:
    """Fixes what is released at config.epsilon by the kind of `plan`. Public data only.

    Raises:
        ConfigError: the plan's release cannot give this unit or neighbouring relation.
    """
    encoder = RowSum.from_tensors(plan.center, plan.matrix, plan.bias, reach=plan.reach)
    if plan.release == "sum":
        # a pooled unit is one row to the sum: the sensitivity of one unit is that of one row
        prepared = encoder.prepare(config.epsilon, config.delta, unit="row", neighboring=config.neighboring)
        return SumSource(prepared, config.unit)
    if plan.release == "response":
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
        return ResponseSource(response, encoder, quantizers, plan.codes, config.unit)
    if plan.release == "mixed":
        check_mixed(config)
        histogram = _histogram(plan, config, Fraction(config.epsilon) * HISTOGRAM_SHARE)
        return prepare_mixed(plan, config, decoders, histogram)
    return _histogram(plan, config, Fraction(config.epsilon))


def _histogram(plan: AnchorPlan, config: DPXAttnConfig, epsilon: Fraction) -> HistogramSource:
    quantizer = RowQuantizer.from_tensors(
        plan.center, plan.matrix.mT, plan.codes[0] - plan.bias, reach=plan.reach
    )
    symmetric = config.neighboring != NeighboringRelation.REPLACE_ONE.value
    histogram = prepare_geometric(
        epsilon,
        cells=plan.codes.shape[1],
        unit="row",  # a pooled unit is one row to it
        neighboring=config.neighboring,
        group_bound=1,
        share_plus=Fraction(1, 2) if symmetric else Fraction(plan.share_plus),
    )
    assert isinstance(histogram.noise, GeometricNoise)
    return HistogramSource(histogram, quantizer, histogram.noise, config.unit)


@dataclass(frozen=True, eq=False)
class PreparedAnchors:
    """An `anchors` release of which everything public is fixed; `events` must be charged before `run_rows`."""

    config: DPXAttnConfig
    plan: AnchorPlan
    decoders: Decoders
    source: Source
    warnings: tuple[str, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        return self.source.events

    def run_rows(
        self,
        rows: torch.Tensor,
        *,
        groups: torch.Tensor | None = None,
        entropy: Entropy | None = None,
    ) -> ContextRelease:
        """Encodes, adds noise, decodes; keeps nothing else of the rows [n, C].

        Raises:
            ContextError, ConfigError: bad rows or groups; nothing is released.
        """
        entropy = SystemEntropy() if entropy is None else entropy
        n = check_context(rows, self.plan.center.shape[0])
        check_groups(self.config.unit, n, groups)
        code = self.source.code(rows, groups, entropy)
        context = self.source.decode(code, self.plan, self.decoders).pruned()
        return ContextRelease(context, self._guarantee(n, groups, entropy.private))

    def _guarantee(self, n: int, groups: torch.Tensor | None, private: bool) -> Guarantee:
        units = n if self.config.unit == "row" else 1 if groups is None else len(torch.unique(groups))
        clip_norm, sensitivity, sigma = self.source.numbers
        return Guarantee(
            mechanism="anchors",
            epsilon=self.config.epsilon,
            delta=self.config.delta,
            unit=self.config.unit,
            neighboring=self.config.neighboring,
            **public_counts(self.config.unit, self.config.neighboring, n, units),
            clip_norm=clip_norm,
            sensitivity=sensitivity,
            sigma=sigma,
            sampling_distance=sampling_distance(),
            private_noise=private,
            calibrated=True,
            clipping=f"{self.source.describe()}; coordinates of rows are first clamped to a public box around the calibration's centre",
        )


def nearest_plan(plans: Sequence[AnchorPlan], epsilon: float) -> AnchorPlan:
    """The plan made for the epsilon nearest to this one (in ratio). Any plan is private at any epsilon; the nearest is the most useful."""
    return min(plans, key=lambda p: max(p.epsilon / epsilon, epsilon / p.epsilon))


def prepare_anchors(
    config: DPXAttnConfig, plans: Sequence[AnchorPlan], decoders: Decoders
) -> PreparedAnchors:
    """What `anchors` releases at config.epsilon. Raises ConfigError where the plan cannot give the config's guarantee."""
    if not plans:
        raise ConfigError(NO_CALIBRATION)
    plan = nearest_plan(plans, config.epsilon)
    return PreparedAnchors(config, plan, decoders, prepare_source(plan, config, decoders))
