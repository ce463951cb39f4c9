r"""Release "mixed": counts of public cells and, beside them, the rows' summed code; for long contexts that may be off the public topic.

The counts say which public rows a context resembles. Rows that resemble none of them fall to the nearest cells all the same, a bias that
no epsilon removes. The mean code tells most of it, and at a thousand rows its noise is small.

*Contribution.* A row adds one count to its cell (`histogram.py`), and f(x) = clip(scale M (x - center)), in the unit ball of R^K
(`row_sum.py`); M is the codebook's own map, scale a public number (`move.RowMove`).

*Formal guarantee.* **Released:** (N + Z, sum_i f(x_i) + W), and nothing else. **Unit:** a row; **neighbouring relation:** replace_one;
others are refused by name. **Sensitivity and noise:** Z is two-sided geometric noise, pure eps_h = 3/4 epsilon as an exact rational; W is
discrete Gaussian noise for the sum's l2 sensitivity of 2 unit balls. **Theorem:** Z and W are independent, so that the pair is the
composition of two releases of the same rows; the variance of W is the least such that epsilon_of([pure eps_h, Gaussian], delta) <=
epsilon, evaluated for the very value that is drawn (`privacy/split.py`). That is the function by which the ledger charges, and both
events are charged. The number of rows n is public under replace_one and travels beside the code. Decoding (`cells.py`, then `move.py`)
is post-processing.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.units import NeighboringRelation, Unit
from ..base import GuaranteeNumbers, Integers, NoisePart
from ..context_rows import ContextRows
from .plan import AnchorPlan, Decoders
from .row_sum import PreparedRowSum
from .sources import AnchorHistogram, PreparedAnchors

HISTOGRAM_SHARE = Fraction(3, 4)  # of epsilon; the sum gets the rest, and all of delta


def check_mixed(config: DPXAttnConfig) -> None:
    """Raises ConfigError for a unit or a neighbouring relation that "mixed" cannot give."""
    if config.unit != Unit.ROW.value:
        raise ConfigError(
            f"This calibration releases counts beside a sum of single rows ('mixed'): it cannot give unit={config.unit!r}. Use unit='row', "
            "or calibrate for that unit."
        )
    if config.neighboring != NeighboringRelation.REPLACE_ONE.value:
        raise ConfigError(
            "This calibration reads the mean of the rows ('mixed'), so their number is public: it cannot give "
            "neighboring='add_or_remove_one'. Use replace_one, or calibrate with releases=('histogram',)."
        )


@dataclass(frozen=True, eq=False)
class AnchorMixed(PreparedAnchors):
    """Counts [m], then the noised sum [K], then the public number of rows: one code of m + K + 1 numbers."""

    additive = True
    histogram: AnchorHistogram
    sum: PreparedRowSum

    @classmethod
    def of(cls, config: DPXAttnConfig, plan: AnchorPlan, decoders: Decoders) -> AnchorMixed:
        """Both releases at config.epsilon.

        Raises:
            ConfigError: another unit or relation, or a calibration without the public move.
        """
        check_mixed(config)
        if decoders.move is None:
            raise ConfigError("The calibration holds no move of its anchors for this plan; calibrate again.")
        histogram = AnchorHistogram.of(config, plan, decoders, HISTOGRAM_SHARE)
        total = plan.encoder(float(decoders.move.scale)).prepare(
            config.epsilon,
            config.delta,
            neighboring=config.neighboring,
            beside=histogram.events,
        )
        return cls(config, plan, decoders, histogram, total)

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (*self.histogram.parts, self.sum.part)

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        return (*self.histogram.exact(private, groups), self.sum.exact_sums(private))

    def code(self, noised: Integers, rows: int | None) -> torch.Tensor:
        assert rows is not None  # replace_one
        total = self.sum.real(noised[1])
        return torch.cat([self.histogram.code(noised[:1], rows), total, total.new_tensor([float(rows)])])

    def decoded(self, code: torch.Tensor, deviation: float | None = None) -> ContextRows:
        if self.decoders.cells is None or self.decoders.move is None:
            raise ConfigError(
                "The calibration holds no anchors, or no move of them, for this plan; calibrate again."
            )
        code = code.cpu()
        counts, total, n = code.split([self.plan.codes.shape[1], self.sum.row_sum.size, 1])
        weights = self.histogram.weights(counts)
        context = self.decoders.cells.decode(weights)
        shift = self.decoders.move.shift(total / n, weights, self.sum.sigma / float(n))
        return ContextRows(context.rows + shift, context.log_weights)

    def features(self, code: torch.Tensor) -> torch.Tensor:
        """Those of the counts."""
        return self.histogram.features(code[: self.plan.codes.shape[1]])

    @property
    def leaves(self) -> GuaranteeNumbers:
        """Those of the sum; a row moves the counts by one up and one down."""
        step = 2.0**-self.sum.exponent
        return GuaranteeNumbers(
            self.sum.bound * step,
            2 * self.sum.bound * step,
            self.sum.sigma,
            f"{self.histogram.leaves.clipping}, at {HISTOGRAM_SHARE} of epsilon; and each row is mapped by a public map into the unit "
            f"ball of R^{self.sum.row_sum.size}, whose exact sum is released with discrete Gaussian noise of standard deviation "
            f"{self.sum.sigma:.4g} for the rest of epsilon and all of delta",
        )

    @property
    def noise_numbers(self) -> dict[str, float]:
        return {**self.histogram.noise_numbers, "sigma": self.sum.sigma}

    def growing(self, units: int | None) -> NoReturn:
        raise ConfigError(
            "A context that grows cannot be released as 'mixed' (counts beside a sum). Calibrate with releases=('histogram',) or ('sum',)."
        )
