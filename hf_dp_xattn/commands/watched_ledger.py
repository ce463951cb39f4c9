"""A ledger that remembers whether this command has charged it: what failed afterwards must be told with that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BudgetExceededError, ConfigError, LedgerError
from ..privacy.accountant import Event
from ..privacy.ledger import Budget, Charge, Ledger, Name


class WatchedLedger(Ledger):
    """charged: None before a charge, then what is known of it, in words for a message."""

    charged: str | None = None

    def charge_all(
        self,
        digests: Sequence[str | Name],
        events: Sequence[Event],
        budget: Budget,
        *,
        note: Mapping[str, Any] | None = None,
    ) -> tuple[Charge, ...]:
        """See `Ledger.charge_all`."""
        try:
            charges = super().charge_all(digests, events, budget, note=note)
        except (BudgetExceededError, ConfigError, LedgerError):
            raise
        except BaseException:  # such as a full disk: the ledger itself cannot tell
            self.charged = self.charged or "may have been charged"
            raise
        self.charged = "was charged"
        return charges
