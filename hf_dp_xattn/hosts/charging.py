"""What a release of a context costs, and whom: its own name, and the names of what it consists of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BudgetExceededError
from ..privacy.ledger import REUSE, Name
from .released_cache import Key

if TYPE_CHECKING:
    import torch

    from ..privacy.accountant import Event
    from ..privacy.ledger import Budget, Ledger
    from .context import PrivateContext


def names_of(ledger: Ledger, context: PrivateContext, groups: torch.Tensor | None) -> list[Name]:
    """All that is charged, as the ledger names it; its own name first. groups: of the private rows."""
    return [
        Name(ledger.digest(p.name), None if p.units is None else ledger.grouping(p.units), p.former)
        for p in context.charged(groups)
    ]


def keys_of(ledger: Ledger, name: Name, variant: bytes, states: Sequence[bytes]) -> list[Key]:
    """Under which a release of a context may be found: as it was encoded by an encoder in one of these states."""
    return [(name.digest, ledger.digest([variant, state])) for state in states]


def may_charge(
    ledger: Ledger,
    budget: Budget,
    names: Sequence[Name],
    events: tuple[Event, ...],
    misfit: str | None = None,
) -> None:
    """Raises BudgetExceededError or ConfigError where the ledger would refuse releases of all of these; nothing is charged.

    misfit: why a release that exists cannot serve one of them.
    """
    if not events or not names:  # what is served again needs no ledger
        return
    try:
        ledger.check_all(names, events, budget)
    except BudgetExceededError as error:
        if misfit is None:
            raise
        raise BudgetExceededError(
            str(error).removesuffix(REUSE)
            + f"The release that exists cannot serve this host as it is now: {misfit}. Restore the weights that it was made with (load or "
            "unload the LoRA), or protect with a larger budget and this ledger (protected.ledger)."
        ) from None


def charge(
    ledger: Ledger, budget: Budget, names: Sequence[Name], events: tuple[Event, ...], **note: Any
) -> None:
    """Charges a release to all names, or to none. Raises BudgetExceededError or ConfigError where the ledger refuses."""
    if events:
        ledger.charge_all(names, events, budget, note=note)
