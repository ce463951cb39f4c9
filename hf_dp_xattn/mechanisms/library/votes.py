r"""`library` for many units: each votes for the public text nearest to it, and noised votes are read as texts with multiplicities.

*Formal guarantee.* Public: the library, a plan (which K entries are voted for, the noise's rates, prior shares), and under replace_one
the number m of units. Private: units u_1, ..., u_m, each encoded by itself; unit i votes for the entry c(u_i) nearest to it, a function of
that unit alone, bit for bit (`entry_lattice.py`). **Released:** Y = N + Z, N_c how many units vote for c, Z independent two-sided geometric
noise, P(Z = z) ~ exp(-r+ z) for z >= 0 and exp(-r- |z|) below. **Sensitivity:** replacing a unit lowers one N_c by 1 and raises another
one by 1; adding or removing it changes one N_c by 1. **Theorem:** epsilon-DP, delta = 0: the likelihood of any y changes by at most r+ + r-
= epsilon under replace_one, and by max(r+, r-) = epsilon under add_or_remove_one (`anchors/histogram.py`, of which a unit here is a row).
Counts, their order and the texts are post-processing of Y. An append of a context that grows has discrete Gaussian noise instead
((epsilon, delta), `privacy/continual.py`), for all appends together.

*Reading.* With s_c the public share of entry c and n the number of units (under add_or_remove_one sum Y stands for it), N_c has the prior
NB(mean n s_c, dispersion r), and Y_c its exact noise: the posterior means are computed over all counts that matter, brought to sum n, and
rounded by largest remainder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.additive import GaussianNoise, GeometricNoise
from ..anchors.histogram import PreparedHistogram, prepare_gaussian, prepare_geometric
from ..base import GuaranteeNumbers, Integers, NoisePart, State, Summed
from ..inputs import may_be_empty, rows_of
from .library import FromLibrary, Shelf

_TAIL = 30.0  # nats of noise beyond which a count is not looked at
_BLOCK = 2**22  # weights of a block


def reach_of(noise: GeometricNoise) -> int:
    """How far from its vote a count is looked at."""
    return math.ceil(_TAIL / float(min(noise.rate_plus, noise.rate_minus)))


def posterior_counts(
    votes: torch.Tensor,
    mean: torch.Tensor,
    dispersion: float,
    log_weight: Callable[[torch.Tensor], torch.Tensor],
    reach: int,
) -> torch.Tensor:
    """The posterior mean of each count, [K] float64. Post-processing.

    Args:
        votes: [K] noised. mean: [K] > 0, of the prior NB(mean, dispersion). log_weight: log P(Z = z) of the noise, up to a constant.
        reach: how far from its vote a count is looked at.
    """
    steps, parts = torch.arange(2 * reach + 1, dtype=torch.float64), []
    for y, m in zip(
        votes.double().split(_BLOCK // len(steps) + 1),
        mean.double().split(_BLOCK // len(steps) + 1),
        strict=True,
    ):
        k = (y.floor() - reach).clamp_min(0.0)[:, None] + steps
        share = (m / (m + dispersion))[:, None]
        prior = torch.lgamma(k + dispersion) - torch.lgamma(k + 1.0) + k * share.log()
        weight = (prior + log_weight(y[:, None] - k)).softmax(dim=1)
        parts.append((weight * k).sum(1))
    return torch.cat(parts) if parts else votes.double()


def whole_counts(means: torch.Tensor, total: int) -> torch.Tensor:
    """Integers [K] >= 0 near to `means` that sum to `total`: in proportion, by largest remainder; ties by index."""
    scaled = means * (total / float(means.sum().clamp_min(1e-30)))
    counts = scaled.floor().to(torch.int64)
    missing = total - int(counts.sum())
    rest = torch.argsort(counts - scaled, stable=True)[: max(0, missing)]
    counts[rest] += 1
    return counts


@dataclass(frozen=True, eq=False)
class Reading:
    """How noised votes become texts. texts: [K]. share: [K] > 0, public, of sum 1. dispersion: of the prior."""

    texts: tuple[str, ...]
    share: torch.Tensor
    dispersion: float

    def counts(
        self,
        votes: torch.Tensor,
        units: int | None,
        log_weight: Callable[[torch.Tensor], torch.Tensor],
        reach: int,
    ) -> torch.Tensor:
        """[K] int64, of sum `units` (None: of what the votes sum to, at least 1)."""
        total = max(1, round(float(votes.sum()))) if units is None else units
        means = posterior_counts(votes, self.share.double() * total, self.dispersion, log_weight, reach)
        return whole_counts(means, total)

    def list(self, counts: torch.Tensor) -> tuple[str, ...]:
        """Each text as often as it counts, the most frequent first."""
        order = torch.argsort(counts, descending=True, stable=True)
        return tuple(self.texts[i] for i in order.tolist() for _ in range(int(counts[i])))


@dataclass(frozen=True, eq=False)
class PreparedVotes(FromLibrary):
    """Votes of which everything public is fixed.

    shelves: one, of the K entries. histogram: of unit="row", as a unit has one vote. reading: of the same entries.
    """

    additive = True
    config: DPXAttnConfig
    shelves: tuple[Shelf, ...]
    histogram: PreparedHistogram
    reading: Reading
    share_plus: float
    answers: int = 1
    counted = True

    @classmethod
    def of(cls, config: DPXAttnConfig, shelf: Shelf, reading: Reading, share_plus: float) -> PreparedVotes:
        """share_plus: of epsilon, what keeps counts from rising; 1/2 under add_or_remove_one.

        Raises:
            ConfigError: out of range, or unit="context", which has one vote.
        """
        if config.unit != "group":
            raise ConfigError("Units vote, and a context is one unit: use unit='group'.")
        if not shelf.lattice.size == len(shelf.texts) == len(reading.texts) == len(reading.share):
            raise ConfigError("Each entry needs a text, a code and a share.")
        share = share_plus if config.neighboring == "replace_one" else 0.5
        histogram = prepare_geometric(
            config.epsilon,
            cells=shelf.lattice.size,
            unit="row",
            neighboring=config.neighboring,
            share_plus=share,
        )
        return cls(config, (shelf,), histogram, reading, share_plus)

    @property
    def parts(self) -> tuple[NoisePart, ...]:
        return (self.histogram.part,)

    @property
    def numbers(self) -> GuaranteeNumbers:
        noise = self.histogram.noise
        assert isinstance(noise, GeometricNoise)
        up, down = float(noise.rate_plus), float(noise.rate_minus)
        return GuaranteeNumbers(
            1.0,
            2.0 if self.config.neighboring == "replace_one" else 1.0,
            0.0,
            f"each text votes for the nearest of {self.histogram.cells} public texts; the votes leave with two-sided geometric noise "
            f"(rates {up:.4g} up, {down:.4g} down) and are read as how often each of these texts stands in the list (pure epsilon; delta "
            "is not used)",
        )

    def count(self, private: torch.Tensor, groups: torch.Tensor | None, *, empty: bool = False) -> int:
        return super().count(private, groups, empty=empty or may_be_empty(self.config.neighboring))

    def exact(self, private: torch.Tensor, groups: torch.Tensor | None) -> Integers:
        """[K]: votes. A sum of a function of each unit alone. PRIVATE."""
        return (self.histogram.exact_sums(self.shelves[0].lattice.nearest(rows_of(private), 1)[:, 0]),)

    def decode(self, noised: Integers, state: State) -> tuple[str, ...]:
        noise, votes = self.histogram.noise, noised[0].cpu()
        if isinstance(noise, GeometricNoise):
            counts = self.reading.counts(votes, state.units, noise.log_weight, reach_of(noise))
            return self.reading.list(counts)
        assert state.deviation is not None  # of a running sum
        deviation = state.deviation * 2.0**-self.histogram.exponent
        # on a finer scale, as votes are no integers
        finer = GaussianNoise(max(1, round(deviation**2 * 2**20)))
        reach = math.ceil(deviation * math.sqrt(2 * _TAIL)) + 1
        counts = self.reading.counts(
            self.histogram.counts(votes), state.units, lambda z: finer.log_weight(z * 2**10), reach
        )
        return self.reading.list(counts)

    def growing(self, units: int | None) -> PreparedVotes:
        """With Gaussian noise on the votes' running sum."""
        config = self.config
        counts = prepare_gaussian(
            config.epsilon,
            config.delta,
            cells=self.histogram.cells,
            unit="row",
            neighboring=config.neighboring,
        )
        return dataclasses.replace(self, histogram=counts)

    @property
    def summed(self) -> Summed:
        return self.histogram.summed(
            f"each text's vote for the nearest of {self.histogram.cells} public texts"
        )

    def at(self, config: DPXAttnConfig) -> PreparedVotes:
        return self.of(config, self.shelves[0], self.reading, self.share_plus)
