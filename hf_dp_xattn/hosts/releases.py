"""`Releases`: what one handle released. Each context once: charged before it is encoded, and found again without a charge."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from ..privacy.accountant import Event
from ..privacy.bits import Entropy
from ..privacy.charges import epsilon_at
from ..privacy.ledger import Name
from ..privacy.units import Unit
from ..report import Guarantee, PrivacyReport
from .accounts import Settings
from .charging import charge, keys_of, may_charge, names_of
from .context import PrivateContext
from .encoders import OTHER_STATE, Encoders
from .host_words import HostWords
from .locks import Lock, locked
from .released_cache import Key
from .reporting import Spent, build_report


class Charged(Protocol):
    """A release of which everything public is fixed. events: what it costs, charged before anything private is computed."""

    @property
    def events(self) -> tuple[Event, ...]: ...


class Guaranteed(Protocol):
    """What was released of one context, and what is promised of it."""

    @property
    def guarantee(self) -> Guarantee: ...


State = TypeVar("State")
"""The host's public state that a release must fit."""
Prepared = TypeVar("Prepared", bound=Charged)
ReleaseT = TypeVar("ReleaseT", bound=Guaranteed)


class Making(Protocol[State, Prepared, ReleaseT]):
    """How one kind of release is made: all that varies between handles."""

    def current(self) -> State:
        """The host's state now. Raises ProtectionLostError where the host is no longer what was protected."""
        ...

    def prepare(self, state: State) -> Prepared:
        """Raises ConfigError where no release can be made."""
        ...

    def prepared_for(self, prepared: Prepared, context: PrivateContext) -> Prepared:
        """What releases this context, chosen by what is public of it: its events are charged, and it is what `run` is given."""
        ...

    def misfit(self, released: ReleaseT, state: State) -> str | None:
        """Why a release cannot serve the host as it is, or None."""
        ...

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None:
        """Tries on public stand-ins what may fail whatever the contexts hold. Raises ContextError."""
        ...

    def run(
        self,
        prepared: Prepared,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: State,
        entropy: Entropy | None,
    ) -> ReleaseT:
        """Encodes and releases one charged context; keeps nothing of it but the release."""
        ...


class Lookup(Protocol[ReleaseT]):
    """Releases by their names (`released_cache.ReleasedCache`)."""

    def find(self, keys: Sequence[Key]) -> ReleaseT | None: ...
    def holds(self, keys: Sequence[Key]) -> bool: ...
    def put(self, key: Key, released: ReleaseT) -> None: ...
    def clear(self) -> None: ...


@dataclass(frozen=True)
class _Plan(Generic[State, Prepared, ReleaseT]):
    """keys: of the contexts, in order. done: what serves them. todo: what is to be made, with its groups, its names and what makes it."""

    keys: list[Key]
    done: dict[Key, ReleaseT]
    todo: dict[Key, tuple[PrivateContext, torch.Tensor | None, list[Name], Prepared]]
    state: State


class Releases(Generic[State, Prepared, ReleaseT]):
    """The ledger, budget and entropy of a handle, the states of its encoders, and its releases.

    Args:
        settings: what a release promises, and who pays.
        making: how one is made.
        cache: where releases are found again.
        lock: held while releases are made.

    *Formal guarantee.* `make` charges a context, under all its names, before `making.run` may read it; what was charged is found again, and
    a second release of it is charged anew, or refused.
    """

    def __init__(
        self,
        settings: Settings,
        making: Making[State, Prepared, ReleaseT],
        cache: Lookup[ReleaseT],
        lock: Lock,
    ) -> None:
        self.config, self.making, self.cache, self.lock = settings.config, making, cache, lock
        self.ledger, self.budget, self.entropy = settings.ledger_used(), settings.scoped(), settings.entropy
        self.encoders = Encoders()
        self.spent: list[Spent] = []
        self.enough: Callable[[int], None] | None = None  # raises where so many units are not worth a charge

    @locked
    @torch.inference_mode(False)  # what is kept must serve other modes too
    @torch.no_grad()
    def make(
        self, contexts: Sequence[PrivateContext], *, groups: torch.Tensor | None = None, fresh: bool = False
    ) -> list[ReleaseT]:
        """One release for each context; equal contexts share one.

        Args:
            contexts: validated and named.
            groups: of the rows, the same for all contexts; public.
            fresh: release again with new noise; charged again.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context.
        """
        plan = self._due(contexts, groups, fresh)
        for context, row_groups, *_ in plan.todo.values():
            if self.enough is not None and context.private_rows:
                self.enough(_units(self.config.unit, context.private_rows, row_groups))
        self.making.rehearse(context for context, *_ in plan.todo.values())
        for key, (context, row_groups, names, prepared) in plan.todo.items():
            charge(self.ledger, self.budget, names, prepared.events)
            released = self.run(prepared, context, row_groups, plan.state)
            self.spent.append(Spent([n.digest for n in names], released.guarantee))
            self.cache.put(key, released)
            plan.done[key] = released
        return [plan.done[key] for key in plan.keys]

    def run(
        self, prepared: Prepared, context: PrivateContext, groups: torch.Tensor | None, state: State
    ) -> ReleaseT:
        """Of a charged context: the only place where a private one is loaded for a release that does not grow."""
        return self.making.run(prepared, context, groups, state, self.entropy)

    @locked
    @torch.inference_mode(False)
    @torch.no_grad()
    def known(self, contexts: Sequence[PrivateContext]) -> list[ReleaseT | None]:
        """The releases that serve these contexts; None for one that is to be made, which the ledger allows for now. Nothing is spent."""
        plan = self._due(contexts, None, False)
        return [plan.done.get(key) for key in plan.keys]

    def _due(
        self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, fresh: bool
    ) -> _Plan[State, Prepared, ReleaseT]:
        """What serves them, and what is to be made. Raises ConfigError, ContextError or BudgetExceededError where it may not be."""
        state = self.making.current()
        prepared = self.making.prepare(state)
        plan: _Plan[State, Prepared, ReleaseT] = _Plan([], {}, {}, state)
        misfit: str | None = None
        states_of = functools.cache(self.encoders.states)  # one look at the weights for all of them
        for context in contexts:
            row_groups = context.groups(groups, self.config.unit)
            names = names_of(self.ledger, context, row_groups)
            variant, states = context.variant_of(row_groups), states_of(context.encoder)
            known = keys_of(self.ledger, names[0], variant, states)
            plan.keys.append(known[0])
            released = None if fresh else self.cache.find(known)
            reason = None if released is None else self.making.misfit(released, state)
            if released is not None and reason is None:
                plan.done[known[0]] = released
                continue
            others = keys_of(self.ledger, names[0], variant, self.encoders.met)
            if released is None and not self.cache.holds(known) and self.cache.holds(others):
                reason = OTHER_STATE
            misfit = misfit or reason
            plan.todo[known[0]] = (context, row_groups, names, self.making.prepared_for(prepared, context))
        new = [name for _, _, names, _ in plan.todo.values() for name in names]
        # mostly one for all
        costs = {recipe.events for *_, recipe in plan.todo.values()} or {prepared.events}
        dearest = (
            max(costs, key=lambda e: epsilon_at(e, self.budget.delta))
            if len(costs) > 1
            else next(iter(costs))
        )
        may_charge(self.ledger, self.budget, new, dearest, misfit)
        return plan

    @locked
    def adopt(self, releases: Iterable[ReleaseT]) -> None:
        """Names releases that were made elsewhere in the report. Whether they fit is for the caller to check."""
        self.spent += [Spent([], m.guarantee) for m in releases]

    def report(
        self, words: HostWords, heads: Sequence[int], warnings: Sequence[str], entries: bool = True
    ) -> PrivacyReport:
        """What was promised, spent and left open; see `build_report`."""
        return build_report(
            words, self.config, heads, self.ledger, self.budget, self.spent, warnings, entries
        )

    def clear(self) -> None:
        """Forgets the releases, not what was spent."""
        self.cache.clear()


def _units(unit: str, rows: int, groups: torch.Tensor | None) -> int:
    """How many units so many private rows are. groups: which rows are one, for unit="group"."""
    if unit == Unit.CONTEXT.value:
        return 1
    return rows if groups is None else len(torch.unique(groups))
