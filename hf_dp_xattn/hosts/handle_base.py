"""What every handle is, whatever it protects: its ledger, a context manager that unprotects, and nothing that is copied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from ..errors import DPXAttnError
from ..privacy.ledger import Budget, Ledger
from .access import NO_COPY
from .releases import Releases

if TYPE_CHECKING:
    from ..privacy.bits import Entropy


class Handle(ABC):
    """releases: what it charged and made."""

    releases: Releases[Any, Any, Any]

    @property
    def ledger(self) -> Ledger:
        """What was spent, and on which context."""
        return self.releases.ledger

    @property
    def budget(self) -> Budget:
        """Of a context."""
        return self.releases.budget

    @property
    def entropy(self) -> Entropy | None:
        """The source of the noise or coins; None: the operating system's."""
        return self.releases.entropy

    @abstractmethod
    def unprotect(self) -> None:
        """Restores the host. Releases stay valid on disk."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unprotect()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)
