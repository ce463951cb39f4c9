"""`BaseGuard`: what every protected host is asked and charged by, whatever of it is private."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol

from ..errors import ProtectionLostError
from ..privacy.ledger import Budget
from ..report import PrivacyReport
from .access import Access
from .accounts import Settings
from .call_stack import HostCode
from .growing import GrowingContext, append_to, open_growing, single_context
from .host_words import HostWords, Setting
from .locks import Lock
from .releases import Lookup, Making, Prepared, Releases, ReleaseT, State

if TYPE_CHECKING:
    import torch

    from ..mechanisms.base import Released
    from .context import PrivateContext
    from .making import Recipe
    from .saving import SaveShadow
    from .storage import ReleaseFile
    from .text.text_release_file import TextReleaseFile


class Guarded(Protocol):
    """What a guard asks of its host (`host.Host` says what each is)."""

    @property
    def model(self) -> Any: ...
    @property
    def undo(self) -> str: ...
    def lost(self) -> str | None: ...
    def words(self, setting: Setting) -> HostWords: ...


class BaseGuard(ABC, Making[State, Prepared, ReleaseT], Generic[State, Prepared, ReleaseT]):
    """Of one host and one handle: whether it is still protected, who may run it, and how its releases are made.

    lock: held while anything of the handle is changed, never while a host runs. calling: held while a pipeline runs that keeps a call's
    state on itself; taken before `lock`. active: from `install` until `unprotect`.
    """

    def __init__(self, host: Guarded, settings: Settings, cache: Lookup[ReleaseT]) -> None:
        self._host, self.config, self.calibration = host, settings.config, settings.calibration
        self.active = False
        self.access = Access()
        self.lock, self.calling = Lock(), Lock()
        self.releases: Releases[State, Prepared, ReleaseT] = Releases(settings, self, cache, self.lock)

    @property
    def model(self) -> Any:
        """The UNet, model or pipeline."""
        return self._host.model

    @property
    def budget(self) -> Budget:
        """Of a context."""
        return self.releases.budget

    @property
    @abstractmethod
    def saving(self) -> SaveShadow:
        """Of the model."""

    # ---- is it still protected ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        lost = self._host.lost() if self.active else "it was unprotected"
        if lost is not None:
            raise ProtectionLostError(
                f"The protection is no longer in place: {lost}. Nothing was run. {self._host.undo}"
            )

    def check_thoroughly(self) -> None:
        """`check`, and all that costs more to see. Before each release, and once for each call of the host."""
        self.check()

    def check_inputs(self) -> None:
        """`check`, before what a release gives to the host is made."""
        self.check()

    @contextmanager
    def public(self) -> Iterator[None]:
        """See `Protected.public`."""
        with self.access.enter("public"):
            yield

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """See `Protected.encoding`."""
        with self.access.enter("encoding"):
            yield

    @contextmanager
    def serving(self, code: HostCode | None = None) -> Iterator[None]:
        """Inside, the host's gates are open: it runs on text that was released or is public, or for a release that was charged.

        code: the host's own, to which alone they are open: what its caller wrote and it calls (a scheduler, a progress bar) does no more
        than outside. None where the caller's code may run it.
        """
        with self.access.enter("serving", code):
            yield

    # ---- releases ----------------------------------------------------------------------------------------------------------

    def prepared_for(self, prepared: Prepared, context: PrivateContext) -> Prepared:
        """What releases this context: the same for all of them."""
        return prepared

    def check_codes(self) -> None:
        """Raises ConfigError where what encodes private texts is no longer what the calibration was made with."""
        return

    @abstractmethod
    def of_corpus(
        self, prepared: Prepared, released: Released, corpus: PrivateContext, state: State
    ) -> ReleaseT:
        """What serves the host, of a corpus that was read as a stream (`corpus.release_corpus`)."""

    @abstractmethod
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> None:
        """Names a release that was made elsewhere in the report. Raises ReleaseError where it does not fit this host."""

    # what a growing release asks (`growing.Grows`)
    @abstractmethod
    def recipe_of(self, context: PrivateContext, horizon: int, state: State) -> Recipe: ...
    @abstractmethod
    def verify(self, contexts: Iterable[ReleaseT]) -> State: ...
    @abstractmethod
    def readable(
        self,
        recipe: Recipe,
        outcome: Released,
        context: PrivateContext,
        public: torch.Tensor,
        before: ReleaseT | None,
        state: State,
    ) -> ReleaseT: ...

    def open(
        self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int
    ) -> GrowingContext:
        """A release that grows; see `Protected.release`."""
        growing = open_growing(self, single_context(contexts), groups, horizon)
        self.releases.spent.append(growing.spent)
        return growing

    def append(
        self, growing: GrowingContext, contexts: Sequence[PrivateContext], groups: torch.Tensor | None
    ) -> Any:
        """See `Release.append`."""
        return append_to(self, growing, single_context(contexts), groups)

    def clear(self) -> None:
        """Forgets what was released and read, not what was spent."""
        self.releases.clear()

    # ---- report ------------------------------------------------------------------------------------------------------------

    def warnings(self) -> tuple[str, ...]:
        """Of the releases that are made now."""
        return ()

    def words(self) -> HostWords:
        """What is public and what is not covered here."""
        return self._host.words(Setting.of(self.config, self.calibration))

    def report(self, entries: bool = True) -> PrivacyReport:
        """See `Protected.report`. entries: with its releases, for which the ledger is read."""
        return self.releases.report(self.words(), [], self.warnings(), entries)
