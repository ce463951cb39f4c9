"""Releases that are due at the first forward which reads them.

A host checks its public arguments (generators, timesteps, images, names) after it has asked for the encoded prompt or document. So it is
given the placeholder of a release that is not made yet: validated, and allowed by the ledger for now. The gate of the UNet or model makes
it, charged before it is encoded as ever, when the first forward comes, to which a call with bad public arguments does not get.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from .bindings import MAX_BINDINGS, Bindings, bind
from .context import PrivateContext
from .locks import Lock, locked
from .placeholder import Tag, new_tag
from .released import ReleasedContext


class MakesReleases(Protocol):
    """Who makes the releases that are due."""

    lock: Lock

    def known(self, contexts: Sequence[PrivateContext]) -> list[ReleasedContext | None]: ...
    def make(self, contexts: Sequence[PrivateContext]) -> list[ReleasedContext]: ...


class Promises:
    """The private contexts whose placeholders are in circulation and whose release is due; in memory, the latest `MAX_BINDINGS`,
    or all of one call that has more."""

    def __init__(self, releases: MakesReleases, bindings: Bindings) -> None:
        self._releases, self._bindings = releases, bindings
        self._due: OrderedDict[Tag, PrivateContext] = OrderedDict()

    @property
    def lock(self) -> Lock:
        return self._releases.lock

    @locked
    def make(self, contexts: Sequence[PrivateContext]) -> tuple[Tag, ...]:
        """One tag for each context: of the release that serves it, or of one that is due. Nothing is spent.

        Raises:
            ContextError, ConfigError, BudgetExceededError: no release could be made of one of them.
        """
        known = self._releases.known(contexts)
        fresh = {c: new_tag() for c, release in zip(contexts, known, strict=True) if release is None}
        self._bindings.add(bind(release, None, release.tag) for release in known if release is not None)
        self._due.update((tag, context) for context, tag in fresh.items())
        while len(self._due) > max(MAX_BINDINGS, len(fresh)):
            self._due.popitem(last=False)
        return tuple(fresh[c] if r is None else r.tag for c, r in zip(contexts, known, strict=True))

    def due(self, tags: Iterable[Tag]) -> bool:
        """Whether releases of some of these are still to be made."""
        return any(tag in self._due for tag in tags)

    @locked
    def keep(self, tags: Iterable[Tag]) -> None:
        """Makes the releases that are due among these, all or none.

        Raises:
            BudgetExceededError, ContextError: see `Protected.release`.
        """
        tags = tuple(tags)
        due = {tag: context for tag in tags if (context := self._due.get(tag)) is not None}
        if not due:
            return
        released = self._releases.make(list(due.values()))
        self._bindings.add((bind(r, None, tag) for tag, r in zip(due, released, strict=True)), beside=tags)
        for tag in due:
            self._due.pop(tag, None)

    def clear(self) -> None:
        self._due.clear()
