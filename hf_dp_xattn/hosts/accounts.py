"""Which ledger a handle charges, and in which words that is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import ConfigError
from ..privacy.default_ledger import VARIABLE, default_ledger, is_default, named_path
from ..privacy.ledger import Budget, Ledger

if TYPE_CHECKING:
    from ..calibration.stored import Stored
    from ..config import DPXAttnConfig
    from ..privacy.bits import Entropy

STAYS = "what was spent stays in its ledger: the process's own is used again, one that you passed must be passed again"
"""Said wherever `unprotect` is advised."""
PROTECT_AGAIN = f"protect again ({STAYS})"
SERVING = (
    "This host was protected by loading a release, and has no ledger: what its contexts have spent is counted where the release was made. "
    "To make new ones too, give it that ledger: Release.from_pretrained(..., host=host, ledger=dpx.Ledger(path)), the variable "
    f"{VARIABLE}=path, or dpx.protect(host, config, ledger=...) before the release is loaded; in each case call dpx.unprotect(host) "
    f"first, and load the release again ({STAYS}). Nothing was spent."
)


class NoLedger(Ledger):
    """Of a handle that serves releases which were loaded, and makes none: it names contexts, and refuses to charge them."""

    def _spend(self, *args: Any, **options: Any) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(SERVING)


@dataclass(frozen=True)
class Settings:
    """What `protect` was told, whatever the host.

    config, calibration, ledger, budget, entropy: see `protect.protect`. serving_only: no release is to be made without a ledger.
    allow_useless: see `worth.require_worth`.
    """

    config: DPXAttnConfig
    calibration: Stored | None = None
    ledger: Ledger | None = None
    budget: Budget | None = None
    entropy: Entropy | None = None
    serving_only: bool = False
    allow_useless: bool = False

    def ledger_used(self) -> Ledger:
        """The ledger that was given, or the process's.

        Seeded noise promises nothing, whatever was charged, so that it has no place in an account of promises: such a handle (of a test)
        counts for itself. A handle that only serves takes the account that the environment names, or none.

        Raises:
            LedgerError: see `default_ledger`.
        """
        if self.ledger is not None:
            return self.ledger
        if self.serving_only and named_path() is None:
            return NoLedger()
        return Ledger() if self.entropy is not None else default_ledger()

    def scoped(self) -> Budget:
        """Of a context: what was given, or one release."""
        c = self.config
        budget = Budget(c.epsilon, c.delta) if self.budget is None else self.budget
        return budget.scoped(c.unit, c.neighboring)


def persistence_of(ledger: Ledger) -> str:
    """Where it counts, and how long, for a report."""
    if isinstance(ledger, NoLedger):
        return "none: this host serves releases that were loaded, and makes no new ones"
    if ledger.persistent:
        return "persistent"
    if is_default(ledger):
        return "in memory only, one for the whole process: it forgets what was spent when the process ends"
    return "in memory only: it forgets what was spent when this ledger is dropped, or when the process ends"
