"""What a release of a context costs, and whom: its own name, and the names of the documents that it consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .context import PrivateContext

if TYPE_CHECKING:
    from ..privacy.accountant import Event
    from .handle import ProtectedPipeline


def names_of(handle: ProtectedPipeline, context: PrivateContext) -> list[str]:
    """All that is charged, as the handle's ledger names it."""
    return [handle.ledger.digest(name) for name in context.names]


def may_charge(handle: ProtectedPipeline, context: PrivateContext, events: tuple[Event, ...]) -> None:
    """Raises BudgetExceededError where the ledger would refuse one of the names; nothing is charged."""
    for name in names_of(handle, context) if events else ():
        handle.ledger.check(name, events, handle.budget)


def charge(
    handle: ProtectedPipeline, context: PrivateContext, events: tuple[Event, ...], **note: Any
) -> None:
    """Charges a release to all names, or to none. (Where another process spends in between, some stay charged and nothing is released.)"""
    may_charge(handle, context, events)
    for name in names_of(handle, context) if events else ():
        handle.ledger.charge(name, events, handle.budget, note=note)
