"""Contexts of a host that grow: `protected.release(context, horizon=64)` opens one, `release.append(more)` goes on.

*What is charged.* A unit enters once, and all that is published up to the horizon costs it the opening's events. So these are charged to
every content that enters, under its own name and before it is encoded: to the first at the opening, to others when they are appended.
Content that has spent its budget elsewhere is refused, and so is what is in already (a whole append, or one of its documents).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError, DPXAttnError, ReleaseError
from ..mechanisms.base import Released
from ..mechanisms.growing_release import GrowingRelease, grow
from ..privacy.ledger import Name
from .charging import charge, names_of
from .context import PrivateContext
from .making import Recipe
from .releases import Releases
from .reporting import Spent

ONE = "A growing release is of ONE context, got {count}: release them one by one, and append to each."


class Grows(Protocol):
    """What a growing release asks of the guard of its host: what a release is made and charged by."""

    config: DPXAttnConfig
    releases: Releases[Any, Any, Any]

    @property
    def calibration(self) -> Any: ...
    def current(self) -> Any: ...
    def recipe_of(self, context: PrivateContext, horizon: int, state: Any) -> Recipe:
        """What releases a context that grows, chosen by what is public of its first content."""
        ...

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None: ...
    def verify(self, contexts: Iterable[Any]) -> Any:
        """The host's state. Raises ReleaseError unless what was released can serve it."""
        ...

    def readable(
        self,
        recipe: Recipe,
        outcome: Released,
        context: PrivateContext,
        public: torch.Tensor,
        before: Any,
        state: Any,
    ) -> Any:
        """What queries read after an append (`ReleasedContext`, `ReleasedTexts`). public: exact rows beside. before: what they read so
        far; None: nothing yet."""
        ...

    def check_thoroughly(self) -> None: ...


class GrowingContext:
    """The private side of a growing release of one handle; in memory only. latest: what queries read; its placeholder keeps its length.
    encoder: the state (`Encoders`) of what encoded its first content."""

    def __init__(
        self,
        release: GrowingRelease,
        recipe: Recipe,
        latest: Any,
        spent: Spent,
        encoder: bytes,
        charged: Sequence[Name],
    ) -> None:
        self.release, self.recipe, self.latest, self.spent = release, recipe, latest, spent
        assert isinstance(spent.digests, list)
        self.digests: list[str] = spent.digests  # which a report counts
        self.names = set(spent.digests)  # of all that is in, or on its way in
        self.charged = set(charged)  # under which grouping, too
        self.encoder = encoder
        self._process = os.getpid()

    def check(self) -> None:
        """Raises ReleaseError unless it may take appends: two processes that went on from one state would add fresh noise to it twice."""
        if os.getpid() != self._process:
            raise ReleaseError(
                "This growing release belongs to the process that opened it; a forked child may read it, not append. Nothing was spent."
            )
        self.release.check()

    def __repr__(self) -> str:
        return f"GrowingContext({self.release!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(
            "A growing release is not pickled or copied; save what it released with save_pretrained."
        )


def single_context(contexts: Sequence[PrivateContext]) -> PrivateContext:
    """Raises ConfigError unless there is one context."""
    if len(contexts) != 1:
        raise ConfigError(ONE.format(count=len(contexts)))
    return contexts[0]


@torch.inference_mode(False)  # what is kept must serve other modes too
@torch.no_grad()
def open_growing(
    guard: Grows,
    context: PrivateContext,
    groups: torch.Tensor | None,
    horizon: int,
) -> GrowingContext:
    """Charges, and releases the first content.

    Raises:
        ConfigError, ContextError: not valid, or a mechanism or unit that cannot grow; nothing was spent.
        BudgetExceededError: the ledger refuses; nothing was spent or computed.
    """
    current = guard.current()
    recipe = guard.recipe_of(context, horizon, current)
    row_groups = context.groups(groups, guard.config.unit)
    encoder = guard.releases.encoders.states(context.encoder)[0]
    prepared = grow(recipe.prepared, horizon, units=getattr(guard.calibration, "units", None))
    charged = names_of(guard.releases.ledger, context, row_groups)
    names = [n.digest for n in charged]
    guard.rehearse([context])
    charge(guard.releases.ledger, guard.releases.budget, charged, prepared.events, horizon=horizon)
    rows, public = context.load()
    release = prepared.open(guard.releases.entropy)
    private = recipe.private(rows, row_groups)
    outcome = release.append(private, groups=row_groups)
    latest = guard.readable(recipe, outcome, context, public, None, current)
    return GrowingContext(release, recipe, latest, Spent(names, latest.guarantee), encoder, charged)


@torch.inference_mode(False)
@torch.no_grad()
def append_to(
    guard: Grows, growing: GrowingContext, context: PrivateContext, groups: torch.Tensor | None
) -> Any:
    """Charges a further content, encodes and adds it.

    Raises:
        ContextError, ConfigError: not valid, a group that an earlier append held, or content that is in already; nothing was released.
        BudgetExceededError: the horizon is reached, or this content has spent its budget elsewhere; nothing was spent.
        ReleaseError: the weights are no longer those that the release was opened with.
    """
    growing.check()
    guard.check_thoroughly()
    current = guard.verify([growing.latest])
    guard.releases.encoders.check(growing.encoder, context.encoder)
    row_groups = context.groups(groups, guard.config.unit)
    if row_groups is not None and groups is None:
        row_groups = row_groups + growing.release.next_group  # phrases: each append's are units of their own
    charged = names_of(guard.releases.ledger, context, row_groups)
    names = [n.digest for n in charged]
    if growing.names & set(names):
        raise ContextError(
            "This content is in the growing context already: a unit enters once. Nothing was released."
        )
    growing.release.check_groups(row_groups)
    entering = False
    growing.names |= set(names)  # before anything is computed: whatever happens then, it does not enter twice
    try:
        if (
            not set(charged) <= growing.charged
        ):  # else an append that failed is made again, under the same groups
            prepared = growing.release.prepared
            guard.rehearse([context])
            charge(
                guard.releases.ledger,
                guard.releases.budget,
                charged,
                prepared.events,
                horizon=prepared.horizon,
            )
            growing.digests.extend(names)
            growing.charged |= set(charged)
        rows, public = context.load()
        private = growing.recipe.private(rows, row_groups)
        entering = True
        outcome = growing.release.append(private, groups=row_groups)
        growing.latest = guard.readable(growing.recipe, outcome, context, public, growing.latest, current)
    except BaseException as error:
        if not entering or isinstance(error, (ConfigError, ContextError)):
            growing.names -= set(names)  # it is not in
        raise
    return growing.latest
