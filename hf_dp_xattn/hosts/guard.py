"""`Guard`: what the gates of one protected host ask: whether it is still protected, what a placeholder names, and what the layers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..config import DPXAttnConfig
from ..errors import ProtectionLostError
from ..privacy.ledger import Budget, Ledger
from ..report import PrivacyReport
from .access import Access
from .bindings import Bindings, bind, unique
from .context import PrivateContext
from .fingerprint import Fingerprint
from .host_words import HostWords, Setting
from .layer import Layer
from .locks import Lock, locked
from .making import Recipe, choose_maker
from .placeholder import Tag, make_placeholder
from .promised import Promises
from .rehearsal import rehearse
from .released import Binding, ReleasedContext, require_fit
from .released_cache import ReleasedCache
from .releases import Releases
from .saving import SaveShadow
from .tables import LayerTable, Tables
from .weights import Weights

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration
    from ..privacy.bits import Entropy

HANDLE_ATTRIBUTE = "_dp_xattn_handle"


class Guarded(Protocol):
    """What a guard asks of its host (`host.Host` says what each is)."""

    model: Any
    layers: dict[str, Layer]
    weights: Weights

    @property
    def projects_rows(self) -> bool: ...
    @property
    def undo(self) -> str: ...
    @property
    def channels(self) -> int: ...
    @property
    def hidden_length(self) -> int: ...
    def lost(self) -> str | None: ...
    def changed(self) -> str | None: ...
    def finished(self, released: ReleasedContext) -> ReleasedContext: ...
    def words(self, setting: Setting) -> HostWords: ...


@dataclass(frozen=True, eq=False)
class _Built:
    """Tables, and what they were built of."""

    key: tuple[torch.device, torch.dtype]
    current: Fingerprint
    bindings: list[Binding]
    tables: dict[str, LayerTable]


class Guard:
    """Made for one host and one handle. How releases are made for it (`releases.Making`), and how they are read.

    lock: held while anything of the handle is changed, never while a host runs. calling: held while a pipeline runs; taken before `lock`.
    active: from `install` until `unprotect`.
    """

    def __init__(
        self,
        host: Guarded,
        config: DPXAttnConfig,
        calibration: AnyCalibration | None,
        *,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        entropy: Entropy | None = None,
        serving_only: bool = False,
    ) -> None:
        self._host, self.config, self.calibration = host, config, calibration
        self.active = False
        self.access = Access()
        self.lock, self.calling = Lock(), Lock()
        self.maker = choose_maker(
            host.model, host.layers, config, calibration, host.weights.current(), serving_only=serving_only
        )
        self.releases: Releases[Fingerprint, Recipe, ReleasedContext] = Releases(
            config,
            self,
            ReleasedCache(),
            self.lock,
            ledger=ledger,
            budget=budget,
            entropy=entropy,
            serving_only=serving_only,
        )
        self.bindings = Bindings()
        self.promises = Promises(self.releases, self.bindings)
        self.saving = SaveShadow(host.model, self)
        self._tables = Tables(host.layers)
        self._built: _Built | None = None

    @property
    def model(self) -> Any:
        """The UNet or model."""
        return self._host.model

    @property
    def budget(self) -> Budget:
        """Of a context."""
        return self.releases.budget

    @property
    def channels(self) -> int:
        """Of a row of context space."""
        return self._host.channels

    @property
    def hidden_length(self) -> int:
        """Length of a placeholder that must not tell how many rows there are."""
        return self._host.hidden_length

    # ---- is it still protected ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        lost = self._host.lost() if self.active else "it was unprotected"
        if lost is not None:
            raise ProtectionLostError(
                f"The protection is no longer in place: {lost}. Nothing was run. {self._host.undo}"
            )

    def check_changes(self) -> None:
        """`check`, and that the model has gained no layer or way around its cross-attention since."""
        self.check()
        changed = self._host.changed()
        if changed is not None:
            raise ProtectionLostError(changed)

    def check_thoroughly(self) -> None:
        """`check_changes`, and a look at the weights. Before each release, and once for each call of the host."""
        self.check_changes()
        self._host.weights.look()

    @contextmanager
    def public(self) -> Iterator[None]:
        """See `Protected.public`."""
        with self.access.enter("public"):
            yield

    # ---- how a release is made (`releases.Making`) -------------------------------------------------------------------------

    @locked  # it runs layers, which some hosts route for that moment
    def fingerprint(self) -> Fingerprint:
        """Of the present weights."""
        return self._host.weights.current()

    def current(self) -> Fingerprint:
        """`fingerprint`, and that nothing was lost."""
        self.check_thoroughly()
        return self.fingerprint()

    def prepare(self, state: Fingerprint) -> Recipe:
        """Public constants of a release."""
        return self.maker.prepare(state)

    def misfit(self, made: ReleasedContext, state: Fingerprint) -> str | None:
        """Why it cannot serve these weights, or None."""
        return made.misfit(state, projected=self._host.projects_rows)

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None:
        """See `rehearsal.rehearse`."""
        rehearse(contexts, self._host.channels, self.config)

    def run(
        self,
        prepared: Recipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: Fingerprint,
        entropy: Entropy | None,
    ) -> ReleasedContext:
        """Encodes and releases one charged context; keeps nothing of it but the release."""
        private, public = context.load()
        if not context.rows:  # known when it is encoded only
            context = dataclasses.replace(context, rows=len(private))
        made = prepared.run(private, groups, entropy)
        released = ReleasedContext(
            structures=made.structures,
            guarantee=context.shown(made.guarantee),
            public_rows=public.detach().clone(),
            rows=context.public_length(self.config, self._host.hidden_length),
            fingerprint=state,
            context=made.context,
        )
        return self._host.finished(released)

    # ---- what a placeholder names, and what the layers read ----------------------------------------------------------------

    @locked
    def adopt(self, contexts: Sequence[ReleasedContext]) -> None:
        """Takes in releases that were made elsewhere: verified, and named in the report."""
        current = self.fingerprint()
        for context in contexts:
            require_fit(context.foreign(current, projected=self._host.projects_rows))
        self.releases.adopt(contexts)

    def verify(self, contexts: Iterable[ReleasedContext]) -> Fingerprint:
        """The fingerprint of the present weights. Raises ReleaseError unless the releases can serve them."""
        current = self.fingerprint()
        for context in contexts:
            require_fit(self.misfit(context, current))
        return current

    @locked
    def bind(self, contexts: Iterable[ReleasedContext]) -> list[Tag]:
        """Puts their own placeholders in circulation."""
        return self.bindings.add(bind(c, None, c.tag) for c in contexts)

    def placeholder(self, tags: Sequence[Tag], rows: int, device: torch.device | str) -> torch.Tensor:
        """[len(tags), rows, C]."""
        return make_placeholder(tags, rows, self._host.channels, self.model.dtype, device)

    @locked
    @torch.inference_mode(False)  # what is kept must serve other modes too
    @torch.no_grad()
    def build(self, tags: Iterable[Tag], device: torch.device | str) -> dict[str, LayerTable]:
        """The layers' tables for these bindings; those that were built last, as long as nothing they are made of has changed.

        Raises:
            ReleaseError: unknown placeholder, releases that cannot stand in one batch, or ones that the weights do not fit.
        """
        bindings = self.bindings.find(unique(tags))
        current = self.verify(b.context for b in bindings)
        key = (torch.device(device), self.model.dtype)
        built = self._built
        if built is None or built.key != key or built.bindings != bindings or not built.current.same(current):
            tables = self._tables.build(bindings, *key, current)
            self._built = built = _Built(key, current, bindings, tables)
        return built.tables

    def clear(self) -> None:
        """Forgets what was released and read, not what was spent."""
        self._built = None
        self._tables.clear()
        self.promises.clear()
        self.releases.clear()

    # ---- report ------------------------------------------------------------------------------------------------------------

    def warnings(self) -> tuple[str, ...]:
        """Of the releases that are made now."""
        return self.maker.warnings(self.fingerprint())

    def report(self) -> PrivacyReport:
        """See `Protected.report`."""
        words = self._host.words(Setting.of(self.config, self.calibration))
        heads = [layer.heads for layer in self._host.layers.values()]
        return self.releases.report(words, heads, self.warnings())


def mark(module: Any, handle: Any) -> None:
    """Lets `handle_on` find the handle from this UNet, model, pipeline or part."""
    vars(module)[HANDLE_ATTRIBUTE] = handle


def unmark(module: Any, handle: Any) -> None:
    """Undoes `mark`, unless another handle has marked it since."""
    if handle_on(module) is handle:
        del vars(module)[HANDLE_ATTRIBUTE]


def handle_on(module: Any) -> Any:
    """What protects this UNet, model or pipeline: its handle, or None."""
    own: Mapping[str, Any] = getattr(module, "__dict__", {})
    return own.get(HANDLE_ATTRIBUTE)
