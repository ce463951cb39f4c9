"""Contexts of a host that grow: `protected.release(context, horizon=64)` opens one, `release.append(more)` goes on.

*What is charged.* A unit enters once, and all that is published up to the horizon costs it the opening's events. So these are charged to
every content that enters, under its own name and before it is encoded: to the first at the opening, to others when they are appended.
Content that has spent its budget elsewhere is refused, and so is what is in already (a whole append, or one of its documents).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError, ContextError, DPXAttnError, ReleaseError
from ..mechanisms.growing_release import GrowingRelease, grow
from ..privacy.ledger import Name
from .charging import charge, names_of
from .context import PrivateContext
from .fingerprint import Fingerprint
from .making import Recipe
from .released import ReleasedContext
from .releases import Releases
from .reporting import Spent

ONE = "A growing release is of ONE context, got {count}: release them one by one, and append to each."


class Grows(Protocol):
    """What a growing release asks of the guard of its host: what a release is made and charged by."""

    config: DPXAttnConfig
    releases: Releases[Fingerprint, Recipe, ReleasedContext]

    @property
    def calibration(self) -> Any: ...
    @property
    def hidden_length(self) -> int: ...
    def current(self) -> Fingerprint: ...
    def prepare(self, state: Fingerprint) -> Recipe: ...
    def rehearse(self, contexts: Iterable[PrivateContext]) -> None: ...
    def verify(self, contexts: Iterable[ReleasedContext]) -> Fingerprint: ...
    def check_thoroughly(self) -> None: ...


class GrowingContext:
    """The private side of a growing release of one handle; in memory only. latest: what queries read; its placeholder keeps its length.
    encoder: the state (`Encoders`) of what encoded its first content."""

    def __init__(
        self,
        release: GrowingRelease,
        recipe: Recipe,
        latest: ReleasedContext,
        spent: Spent,
        encoder: bytes,
        charged: Sequence[Name],
    ) -> None:
        self.release, self.recipe, self.latest, self.spent = release, recipe, latest, spent
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
    recipe = guard.prepare(current)
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
    length = context.public_length(guard.config, guard.hidden_length)
    state = release.append(private, groups=row_groups)
    exact = public.detach().clone()
    latest = ReleasedContext(
        state.structures, context.shown(state.guarantee), exact, length, current, state.context
    )
    return GrowingContext(release, recipe, latest, Spent(names, latest.guarantee), encoder, charged)


@torch.inference_mode(False)
@torch.no_grad()
def append_to(
    guard: Grows, growing: GrowingContext, context: PrivateContext, groups: torch.Tensor | None
) -> ReleasedContext:
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
            growing.spent.digests.extend(names)
            growing.charged |= set(charged)
        rows, _ = context.load()
        private = growing.recipe.private(rows, row_groups)
        entering = True
        before = growing.latest
        state = growing.release.append(private, groups=row_groups)
        promised = context.shown(state.guarantee)
        if before.guarantee.rows is None:  # what hid its length is in the sum
            promised = dataclasses.replace(promised, rows=None)
        growing.latest = ReleasedContext(
            state.structures, promised, before.public_rows, before.rows, current, state.context
        )
    except BaseException as error:
        if not entering or isinstance(error, (ConfigError, ContextError)):
            growing.names -= set(names)  # it is not in
        raise
    return growing.latest
