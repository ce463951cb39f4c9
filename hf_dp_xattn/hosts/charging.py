"""What a release of a context costs, and whom: its own name, and the names of what it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .context import PrivateContext

if TYPE_CHECKING:
    from ..privacy.accountant import Event
    from .handle import ProtectedPipeline


def names_of(handle: ProtectedPipeline, context: PrivateContext) -> list[str]:
    """All that is charged, as the handle's ledger names it."""
    return [handle.ledger.digest(name) for name in context.names]


def may_charge(
    handle: ProtectedPipeline, contexts: Sequence[PrivateContext], events: tuple[Event, ...]
) -> None:
    """Raises BudgetExceededError or ConfigError where the ledger would refuse releases of all of these; nothing is charged."""
    if events and contexts:  # what is served again needs no ledger
        digests = [name for context in contexts for name in names_of(handle, context)]
        handle.ledger.check_all(digests, events, handle.budget)


def charge(
    handle: ProtectedPipeline, context: PrivateContext, events: tuple[Event, ...], **note: Any
) -> None:
    """Charges a release to all names, or to none. Raises BudgetExceededError or ConfigError where the ledger refuses."""
    if events:
        handle.ledger.charge_all(names_of(handle, context), events, handle.budget, note=note)
