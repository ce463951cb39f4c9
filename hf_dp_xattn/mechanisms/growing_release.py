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

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from ..config import DPXAttnConfig
from ..errors import BudgetExceededError, ConfigError, ContextError, DPXAttnError
from ..privacy.accountant import Event
from ..privacy.bits import Entropy, SystemEntropy
from ..privacy.continual import ContinualPlan, RunningSum, choose_factors
from ..privacy.units import NeighboringRelation
from ..report import Guarantee
from .base import GuaranteeNumbers, Integers, Mechanism, Released, guarantee_of, perturb
from .inputs import MAX_ROWS, Private, count_units, may_be_empty

CLOSED = (
    "This growing release takes no more: {why}. What was released serves any number of queries. To go on, open a new one with a longer "
    "horizon, which is charged."
)


@dataclass(frozen=True, eq=False)
class PreparedGrowing:
    """A growing release of which everything public is fixed. `events` must be charged, once, before `open`.

    mechanism: of the appends. plan: of their running sum; None: every unit answers for itself.
    """

    mechanism: Mechanism[Any]
    horizon: int
    plan: ContinualPlan | None

    @property
    def config(self) -> DPXAttnConfig:
        return self.mechanism.config

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.mechanism.warnings

    @property
    def events(self) -> tuple[Event, ...]:
        return self.mechanism.events if self.plan is None else (self.plan.event,)

    @property
    def numbers(self) -> GuaranteeNumbers:
        """For the guarantee: of the appends' own noise, or of the running sum's."""
        summed, plan = self.mechanism.summed, self.plan
        if summed is None or plan is None:
            answers = self.mechanism.numbers
            clipping = f"{answers.clipping}; every unit answers once, when it is appended"
            return dataclasses.replace(answers, clipping=clipping)
        shifted, last = (
            2.0 ** (plan.shift - summed.exponent),
            plan.deviation(plan.horizon) * 2.0**-summed.exponent,
        )
        return GuaranteeNumbers(
            summed.clip_norm,
            plan.event.sensitivity * shifted,
            math.sqrt(plan.sigma_squared) * shifted,
            f"{summed.what} is clipped to norm {summed.clip_norm:.4g}; the running sum leaves with discrete Gaussian noise "
            f"({plan.factors.name} factorisation) of standard deviation {last:.4g} in its last state",
        )

    def open(self, entropy: Entropy | None = None) -> GrowingRelease:
        """Starts with nothing in it."""
        return GrowingRelease(self, SystemEntropy() if entropy is None else entropy)


class GrowingRelease:
    """A running release; `append` is the only private step. It lives in the memory of one process: never pickled, copied or saved."""

    def __init__(self, prepared: PreparedGrowing, entropy: Entropy) -> None:
        self.prepared = prepared
        self.appends = self.rows = self.units = 0
        self._entropy = entropy
        self._running = None if prepared.plan is None else RunningSum(prepared.plan, entropy)
        self._answers: Integers = ()  # released; nothing private
        self._groups: set[int] = set()
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"GrowingRelease(appends={self.appends} of {self.prepared.horizon}, mechanism={self.prepared.config.mechanism!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise DPXAttnError(
            "A growing release holds private sums: it is not pickled or copied. Save what it released."
        )

    @property
    def next_group(self) -> int:
        """A group number that no append has used."""
        return max(self._groups, default=-1) + 1

    def append(self, private: Private, *, groups: torch.Tensor | None = None) -> Released:
        """Adds a batch of whole units, and gives what queries read from now on.

        Args:
            private: `LayerRows`, or rows [n, C] of context space, as the mechanism takes them.
            groups: [n] public, for unit='group'; numbers that no earlier append used.

        Raises:
            BudgetExceededError: all appends are made, or it was closed. ContextError, ConfigError: bad rows or groups, or a group that an
                earlier append held. Nothing was released, and the append may be made again.
        """
        self.check()
        config = self.prepared.config
        n = self.prepared.mechanism.count(private, groups, empty=may_be_empty(config.neighboring))
        new = self.check_groups(groups)
        if self.rows + n > MAX_ROWS:
            raise ContextError(f"A growing context has at most {MAX_ROWS} rows; nothing was released.")
        try:
            total, deviation = self._add(private, groups)
        except (ConfigError, ContextError):
            raise
        except BaseException:
            # it may be in the sum already: going on would let it enter twice
            self.close()
            raise
        self.appends += 1
        self.rows += n
        self.units += count_units(config.unit, n, groups)
        self._groups |= new
        state = self.prepared.mechanism.state(self.rows, self.units, deviation)
        try:
            content = self.prepared.mechanism.decode(total, state)
        except BaseException:
            self.close()  # made again, the append would enter twice
            raise
        return Released(content, self.guarantee())

    def _add(self, private: Private, groups: torch.Tensor | None) -> tuple[Integers, float | None]:
        """The noised total of all appends in lattice steps, and the standard deviation of a running sum's noise."""
        mechanism = self.prepared.mechanism
        if self._running is None:
            noised = perturb(mechanism.exact(private, groups), mechanism.parts, self._entropy)
            self._answers = mechanism.join(self._answers, noised)
            return self._answers, None
        self._running.check()
        exact = mechanism.exact(private, groups)
        total = self._running.add(torch.cat([t.flatten().cpu() for t in exact]))
        parts = zip(total.split([t.numel() for t in exact]), exact, strict=True)
        return tuple(t.reshape(e.shape) for t, e in parts), self._running.plan.deviation(self._running.steps)

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
        if self._running is not None:
            self._running.close()

    def guarantee(self) -> Guarantee:
        """What is promised about all states together, up to the horizon."""
        config, numbers = self.prepared.config, self.prepared.numbers
        counted = config.neighboring == NeighboringRelation.REPLACE_ONE.value
        sizes = f", and the number of its {config.unit}s," if counted else ""
        clipping = (
            f"a context that grows by at most {self.prepared.horizon} appends; what enters is charged once, for all of them; each "
            f"{config.unit} enters at one append, whose time{sizes} is public; {numbers.clipping}"
        )
        return guarantee_of(
            config,
            dataclasses.replace(numbers, clipping=clipping),
            self.rows,
            self.units,
            self.prepared.events,
            private_noise=self._entropy.private,
            calibrated=self.prepared.mechanism.calibrated,
        )


def grow(prepared: Mechanism[Any], horizon: int, *, units: int | None = None) -> PreparedGrowing:
    """The growing form of a prepared release, for at most `horizon` appends.

    Args:
        prepared: a release of a mechanism that can grow.
        horizon: how many appends there may be.
        units: how many units the public contexts of an `anchors` calibration had (`calibration.units`); its decoder is shown the mean.

    Raises:
        ConfigError: a mechanism, unit or plan that cannot grow, or a horizon out of range.
    """
    config = prepared.config
    choose_factors(horizon, 1)  # validates the horizon
    mechanism = prepared.growing(units)
    if config.unit == "context":
        raise ConfigError(
            "A context that grows is not one unit that enters once: use unit='row', or unit='group' with a group for each document."
        )
    summed = mechanism.summed
    if summed is None:
        return PreparedGrowing(mechanism, horizon, None)
    plan = ContinualPlan.prepare(
        size=summed.size,
        sensitivity=summed.sensitivity,
        horizon=horizon,
        epsilon=config.epsilon,
        delta=config.delta,
    )
    return PreparedGrowing(mechanism, horizon, plan)
