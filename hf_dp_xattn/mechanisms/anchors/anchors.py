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

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.additive import GeometricNoise
from ...privacy.response import RandomizedResponse
from ...privacy.units import NeighboringRelation
from ..base import Answers, GuaranteeNumbers, Integers, Mechanism, NoisePart, State, Summand
from ..context_rows import ContextRows
from ..inputs import check_context, check_groups, rows_of
from .histogram import prepare_geometric
from .mixed import HISTOGRAM_SHARE, check_mixed, prepare_mixed
from .plan import AnchorPlan, Decoders
from .quantizer import RowQuantizer
from .row_sum import RowSum
from .sources import HistogramSource, ResponseSource, Source, SumSource

NO_CALIBRATION = (
    "mechanism='anchors' needs a calibration: its codebook, encoder and decoder are fitted to PUBLIC contexts. Make one with "
    "dpx.calibrate(pipe, public_contexts, config), or load a shared one with dpx.Calibration.from_pretrained(...)."
)


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
class PreparedAnchors(Mechanism[torch.Tensor]):
    """An `anchors` release of which everything public is fixed; its `source` is the kind of release that the plan chose."""

    config: DPXAttnConfig
    plan: AnchorPlan
    decoders: Decoders
    source: Source
    warnings: tuple[str, ...] = ()
    calibrated: bool = True

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return self.source.parts

    def count(self, private: torch.Tensor, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        n = check_context(rows_of(private), self.plan.center.shape[0], may_be_empty=empty)
        check_groups(self.config.unit, n, groups)
        return n

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return self.source.exact(private, groups)

    def decode(self, noised: Integers, state: State) -> ContextRows:
        return self.source.decode(self.source.code(noised, state.rows), self.plan, self.decoders).pruned()

    @property
    def numbers(self) -> GuaranteeNumbers:
        found = self.source.numbers
        public_box = "coordinates of rows are first clamped to a public box around the calibration's centre"
        return dataclasses.replace(found, clipping=f"{found.clipping}; {public_box}")

    def growing(self, units: int | None) -> Summand | Answers[torch.Tensor]:
        return self.source.growing(self.config, self.plan, self.decoders, units)

    def at(self, config: DPXAttnConfig) -> PreparedAnchors:
        """The same plan's release at another epsilon."""
        source = prepare_source(self.plan, config, self.decoders)
        return dataclasses.replace(self, config=config, source=source)


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
