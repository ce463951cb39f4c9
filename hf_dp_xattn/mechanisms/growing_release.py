r"""`GrowingRelease`: one running release of a context to which documents are added; each unit is charged once for all of it.

*Formal guarantee.* **Released:** the noised vectors y_1, ..., y_T of `privacy/continual.py`, one at each of at most T = horizon appends;
every state in between is post-processing of them. **Unit:** a row, or a group of rows; an append is a batch of whole units, a unit enters
at ONE append (a group that comes back is refused), its contribution is clipped as in a release at once, and the sum over an append's
units is exact. **Neighbouring relation:** config's, for one unit of one append. Under both relations it is public how many appends there
are and when they come; under replace_one also how many rows and units each brings. **Sensitivity:** c Delta, c the largest column norm of
the integer factor, Delta that of a release at once. **Noise, theorem:** privacy/continual.py, adaptively chosen appends included: one
`GaussianEvent`.

*Randomised response* (an `anchors` plan that answers once for each unit) needs no such noise: each unit's answer depends on that unit
alone, so T appends of distinct units cost what one does (parallel composition), adaptively chosen ones too, and the error does not grow.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from ..config import DPXAttnConfig
from ..errors import BudgetExceededError, ConfigError, ContextError, DPXAttnError
from ..privacy.accountant import Event, GaussianEvent
from ..privacy.bits import Entropy, SystemEntropy
from ..privacy.continual import ContinualPlan, RunningSum, choose_factors
from ..privacy.noise import sampling_distance
from ..privacy.units import NeighboringRelation, public_counts
from ..report import Guarantee
from .anchors.anchors import HistogramSource, PreparedAnchors, ResponseSource, SumSource
from .anchors.histogram import prepare_gaussian
from .anchors.mixed import MixedSource
from .anchors.plan import AnchorPlan, Decoders
from .base import LayerRelease, LayerSpec, PublicCalibration
from .context_rows import ContextRelease, ContextRows
from .growing_sources import (
    CellSource,
    Content,
    KernelSource,
    LearnedSumSource,
    Private,
    Source,
    State,
    count_rows,
    mean_ratio,
    rows_of,
    weighted,
)
from .kernel_sum.contributions import MAX_ROWS, check_groups
from .kernel_sum.kernel_sum import PreparedKernelSum
from .release_attention import prepare_release

CLOSED = (
    "This growing release takes no more: {why}. What was released serves any number of queries. To go on, open a new one with a longer "
    "horizon, which is charged."
)


class Way(Protocol):
    """How totals are made and read: by a continual sum, or by answers that stand for themselves."""

    @property
    def events(self) -> tuple[Event, ...]: ...

    @property
    def numbers(self) -> tuple[float, float, float]:
        """(clip norm, sensitivity, sigma) for the guarantee's record."""
        ...

    def describe(self) -> str: ...

    def run(self, entropy: Entropy) -> Run: ...

    def current(self, state: State) -> Content: ...


class Run(Protocol):
    """The private side of one growing release."""

    def add(self, private: Private, groups: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        """The noised total of all appends in lattice units, and the standard deviation of its noise."""
        ...

    def close(self) -> None:
        """Drops what is private."""
        ...


@dataclass(frozen=True, eq=False)
class ContinualWay:
    """A source's vectors through a continual sum."""

    source: Source
    plan: ContinualPlan

    @property
    def events(self) -> tuple[Event, ...]:
        return (self.plan.event,)

    @property
    def numbers(self) -> tuple[float, float, float]:
        step = 2.0 ** (self.plan.shift - self.source.exponent)
        sigma = math.sqrt(self.plan.sigma_squared)
        return self.source.clip_norm, self.plan.event.sensitivity * step, sigma * step

    def describe(self) -> str:
        step = 2.0**-self.source.exponent
        last = self.plan.deviation(self.plan.horizon) * step
        return (
            f"{self.source.describe()} is clipped to norm {self.source.clip_norm:.4g}; the running sum leaves with discrete Gaussian "
            f"noise ({self.plan.factors.name} factorisation) of standard deviation {last:.4g} in its last state"
        )

    def run(self, entropy: Entropy) -> Run:
        return _SumRun(self.source, RunningSum(self.plan, entropy))

    def current(self, state: State) -> Content:
        return self.source.current(state)


@dataclass(frozen=True, eq=False)
class _SumRun:
    source: Source
    running: RunningSum

    def add(self, private: Private, groups: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        self.running.check()
        total = self.running.add(self.source.exact(private, groups))
        return total, self.running.plan.deviation(self.running.steps)

    def close(self) -> None:
        self.running.close()


@dataclass(frozen=True, eq=False)
class AnswerWay:
    """k-ary randomised response: the total is the sum of the units' answers. units: how many the decoder's public contexts had."""

    source: ResponseSource
    plan: AnchorPlan
    decoders: Decoders
    units: int
    neighboring: str

    @property
    def events(self) -> tuple[Event, ...]:
        return self.source.events

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.source.numbers

    def describe(self) -> str:
        return f"{self.source.describe()}; every unit answers once, when it is appended"

    def run(self, entropy: Entropy) -> Run:
        return _AnswerRun(self, entropy, [])

    def current(self, state: State) -> ContextRows:
        ratio = mean_ratio(self.units, state.units)
        return weighted(self.source.decode(state.total * ratio, self.plan, self.decoders), ratio)


@dataclass(frozen=True, eq=False)
class _AnswerRun:
    way: AnswerWay
    entropy: Entropy
    answers: list[torch.Tensor]  # the sum of the appends' released codes; nothing private

    def add(self, private: Private, groups: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        rows = rows_of(private, self.way.plan.center.shape[0], self.way.neighboring)
        code = self.way.source.code(rows, groups, self.entropy)
        self.answers[:] = [code + self.answers[0] if self.answers else code]
        return self.answers[0], 0.0

    def close(self) -> None:
        pass


@dataclass(frozen=True, eq=False)
class PreparedGrowing:
    """A growing release of which everything public is fixed. `events` must be charged, once, before `open`."""

    config: DPXAttnConfig
    horizon: int
    way: Way
    calibrated: bool
    warnings: tuple[str, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        return self.way.events

    def open(self, entropy: Entropy | None = None) -> GrowingRelease:
        """Starts with nothing in it."""
        return GrowingRelease(self, SystemEntropy() if entropy is None else entropy)


class GrowingRelease:
    """A running release; `append` is the only private step. It lives in the memory of one process: never pickled, copied or saved."""

    def __init__(self, prepared: PreparedGrowing, entropy: Entropy) -> None:
        self.prepared = prepared
        self.appends = self.rows = self.units = 0
        self._entropy = entropy
        self._run = prepared.way.run(entropy)
        self._groups: set[int] = set()
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"GrowingRelease(appends={self.appends} of {self.prepared.horizon}, mechanism={self.prepared.config.mechanism!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise DPXAttnError(
            "A growing release holds private sums: it is not pickled or copied. Save what it released."
        )

    @classmethod
    def open(
        cls,
        config: DPXAttnConfig,
        horizon: int,
        specs: Sequence[LayerSpec],
        calibration: PublicCalibration | None = None,
        *,
        entropy: Entropy | None = None,
    ) -> GrowingRelease:
        """A kernel_sum release over layers of these shapes. The caller accounts for `prepared.events` (`protect` does it)."""
        return grow(prepare_release(config, specs, calibration), horizon).open(entropy)

    @property
    def next_group(self) -> int:
        """A group number that no append has used."""
        return max(self._groups, default=-1) + 1

    def append(
        self, private: Private, *, groups: torch.Tensor | None = None
    ) -> LayerRelease | ContextRelease:
        """Adds a batch of whole units, and gives what queries read from now on.

        Args:
            private: `LayerRows`, or rows [n, C] of context space, as the mechanism takes them.
            groups [n]: public, for unit='group'; numbers that no earlier append used.

        Raises:
            BudgetExceededError: all appends are made, or it was closed. ContextError, ConfigError: bad rows or groups, or a group that an
                earlier append held. Nothing was released, and the append may be made again.
        """
        self.check()
        config, n = self.prepared.config, count_rows(private)
        check_groups(config.unit, n, groups)
        new = self.check_groups(groups)
        if self.rows + n > MAX_ROWS:
            raise ContextError(f"A growing context has at most {MAX_ROWS} rows; nothing was released.")
        try:
            total, deviation = self._run.add(private, groups)
        except (ConfigError, ContextError):
            raise
        except BaseException:
            # it may be in the sum already: going on would let it enter twice
            self.close()
            raise
        self.appends += 1
        self.rows += n
        self.units += n if groups is None else len(new)
        self._groups |= new
        counts = public_counts(config.unit, config.neighboring, self.rows, self.units)
        state = State(total, deviation, **counts)
        try:
            content = self.prepared.way.current(state)
        except BaseException:
            self.close()  # made again, the append would enter twice
            raise
        if isinstance(content, ContextRows):
            return ContextRelease(content, self.guarantee())
        return LayerRelease(content, self.guarantee())

    def check_groups(self, groups: torch.Tensor | None) -> set[int]:
        """The groups' numbers. Raises ContextError where an earlier append held one of them."""
        new = set() if groups is None else set(torch.unique(groups).tolist())
        if new & self._groups:
            raise ContextError(
                "A group may not span two appends: a unit enters once. Append whole groups, under numbers of their own; nothing was "
                "released."
            )
        return new

    def check(self) -> None:
        """Raises BudgetExceededError where no further append is possible, DPXAttnError in another process than the opening's."""
        if os.getpid() != self._pid:
            raise DPXAttnError(
                "A growing release does not go on in another process: what both of them append would be one charge for two releases."
            )
        if self._closed:
            raise BudgetExceededError(CLOSED.format(why="it was closed"))
        if self.appends >= self.prepared.horizon:
            raise BudgetExceededError(CLOSED.format(why=f"all {self.prepared.horizon} appends are made"))

    def close(self) -> None:
        """Drops what is private; what was released stays valid."""
        self._closed = True
        self._run.close()

    def guarantee(self) -> Guarantee:
        """What is promised about all states together, up to the horizon."""
        config = self.prepared.config
        counted = config.neighboring == NeighboringRelation.REPLACE_ONE.value
        clip_norm, sensitivity, sigma = self.prepared.way.numbers
        sizes = ", and the number of its rows," if counted else ""
        return Guarantee(
            mechanism=config.mechanism,
            epsilon=config.epsilon,
            delta=config.delta,
            unit=config.unit,
            neighboring=config.neighboring,
            **public_counts(config.unit, config.neighboring, self.rows, self.units),
            clip_norm=clip_norm,
            sensitivity=sensitivity,
            sigma=sigma,
            sampling_distance=sampling_distance(),
            private_noise=self._entropy.private,
            calibrated=self.prepared.calibrated,
            clipping=(
                f"a context that grows by at most {self.prepared.horizon} appends; what enters is charged once, for all of them; each "
                f"{config.unit} enters at one append, whose time{sizes} is public; {self.prepared.way.describe()}"
            ),
        )


def grow(prepared: Any, horizon: int, *, units: int | None = None) -> PreparedGrowing:
    """The growing form of a prepared release (`PreparedKernelSum` or `PreparedAnchors`), for at most `horizon` appends.

    Args:
        units: how many units the public contexts of an `anchors` calibration had (`calibration.units`); its decoder is shown the mean.

    Raises:
        ConfigError: a mechanism, unit or plan that cannot grow, or a horizon out of range.
    """
    if not isinstance(prepared, (PreparedKernelSum, PreparedAnchors)):
        raise ConfigError(
            "A context grows with mechanism='kernel_sum' or 'anchors'; 'dptree' and 'none' release once. Change the mechanism, or leave "
            "out the horizon."
        )
    config = prepared.config
    if config.unit == "context":
        raise ConfigError(
            "A context that grows is not one unit that enters once: use unit='row', or unit='group' with a group for each document."
        )
    choose_factors(horizon, 1)  # validates the horizon
    if isinstance(prepared, PreparedKernelSum):
        if prepared.sketch is not None and config.neighboring != NeighboringRelation.REPLACE_ONE.value:
            raise ConfigError(
                "The decoder of a calibrated kernel_sum needs the number of units, which add_or_remove_one keeps private while a context "
                "grows. Use replace_one, or no calibration."
            )
        kernel = KernelSource(prepared)
        return _continual(config, horizon, kernel, prepared.calibrated, prepared.warnings)
    source, plan, decoders = prepared.source, prepared.plan, prepared.decoders
    if isinstance(source, MixedSource):
        raise ConfigError(
            "A context that grows cannot be released as 'mixed' (counts beside a sum). Calibrate with releases=('histogram',) or ('sum',)."
        )
    if isinstance(source, HistogramSource):
        counts = prepare_gaussian(
            config.epsilon,
            config.delta,
            cells=source.prepared.cells,
            unit=config.unit,
            neighboring=config.neighboring,
            group_bound=1 if config.unit == "row" else plan.bound,
        )
        (event,) = counts.events
        assert isinstance(event, GaussianEvent)
        cells = CellSource(counts, event.sensitivity, source.quantizer, decoders)
        return _continual(config, horizon, cells, True, prepared.warnings)
    if units is None or units < 1:
        raise ConfigError("`units` is needed: how many units the calibration's public contexts had.")
    if isinstance(source, ResponseSource):
        answers = AnswerWay(source, plan, decoders, units, config.neighboring)
        return PreparedGrowing(config, horizon, answers, True, prepared.warnings)
    assert isinstance(source, SumSource)
    learned = LearnedSumSource(source, plan, decoders, units)
    return _continual(config, horizon, learned, True, prepared.warnings)


def _continual(
    config: DPXAttnConfig, horizon: int, source: Source, calibrated: bool, notes: tuple[str, ...]
) -> PreparedGrowing:
    plan = ContinualPlan.prepare(
        size=source.size,
        sensitivity=source.sensitivity,
        horizon=horizon,
        epsilon=config.epsilon,
        delta=config.delta,
    )
    return PreparedGrowing(config, horizon, ContinualWay(source, plan), calibrated, notes)
