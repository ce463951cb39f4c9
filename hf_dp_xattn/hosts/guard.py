"""`Guard`: what the gates of one protected host ask: whether it is still protected, what a placeholder names, and what the layers read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..errors import ProtectionLostError, ReleaseError
from ..mechanisms.base import Released
from ..report import PrivacyReport
from . import base_guard
from .accounts import STAYS, Settings
from .base_guard import BaseGuard
from .bindings import Bindings, bind, unique
from .context import PrivateContext
from .fingerprint import Fingerprint
from .growing import GrowingContext
from .layer import Layer
from .locks import locked
from .making import Recipe, choose_maker
from .placeholder import Tag, make_placeholder
from .promised import Promises
from .rehearsal import rehearse
from .released import Binding, ReleasedContext, require_fit
from .released_cache import ReleasedCache
from .saving import SaveShadow
from .storage import ReleaseFile
from .tables import LayerTable, Tables
from .weights import Weights

if TYPE_CHECKING:
    from ..privacy.bits import Entropy
    from .text.text_release_file import TextReleaseFile

HANDLE_ATTRIBUTE = "_dp_xattn_handle"


class Guarded(base_guard.Guarded, Protocol):
    """What a guard asks of its host (`layer_host.LayerHost` says what each is)."""

    layers: dict[str, Layer]
    weights: Weights

    @property
    def projects_rows(self) -> bool: ...
    @property
    def channels(self) -> int: ...
    @property
    def hidden_length(self) -> int: ...
    def changed(self) -> str | None: ...
    def finished(self, released: ReleasedContext) -> ReleasedContext: ...
    def check_growing(self, contexts: Sequence[PrivateContext]) -> None: ...


@dataclass(frozen=True, eq=False)
class _Built:
    """Tables, and what they were built of."""

    key: tuple[torch.device, torch.dtype]
    current: Fingerprint
    bindings: list[Binding]
    tables: dict[str, LayerTable]


class Guard(BaseGuard[Fingerprint, Recipe, ReleasedContext]):
    """Of a host whose layers read a context: how releases are made for it (`releases.Making`), and how they are read."""

    _host: Guarded

    def __init__(self, host: Guarded, settings: Settings) -> None:
        self.maker = choose_maker(host.model, host.layers, settings, host.weights.current())
        super().__init__(host, settings, ReleasedCache())
        self.bindings = Bindings()
        self.promises = Promises(self.releases, self.bindings)
        self._saving = SaveShadow(host.model, self)
        self._tables = Tables(host.layers)
        self._built: _Built | None = None

    @property
    def saving(self) -> SaveShadow:
        return self._saving

    @property
    def channels(self) -> int:
        """Of a row of context space."""
        return self._host.channels

    @property
    def hidden_length(self) -> int:
        """Length of a placeholder that must not tell how many rows there are."""
        return self._host.hidden_length

    # ---- is it still protected ---------------------------------------------------------------------------------------------

    def check_changes(self) -> None:
        """`check`, and that the model has gained no layer or way around its cross-attention since."""
        self.check()
        changed = self._host.changed()
        if changed is not None:
            raise ProtectionLostError(changed)

    def check_thoroughly(self) -> None:
        """`check_changes`, and a look at the weights."""
        self.check_changes()
        self._host.weights.look()

    def check_inputs(self) -> None:
        """`check_changes`; a call is about to come, which looks at the weights."""
        self.check_changes()
        self._host.weights.expect()

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

    def misfit(self, released: ReleasedContext, state: Fingerprint) -> str | None:
        """Why it cannot serve these weights, or None."""
        return released.misfit(state, projected=self._host.projects_rows)

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
        outcome = prepared.run(private, groups, entropy)
        return self._host.finished(self.readable(prepared, outcome, context, public, None, state))

    def of_corpus(
        self, prepared: Recipe, outcome: Released, corpus: PrivateContext, state: Fingerprint
    ) -> ReleasedContext:
        no_public = torch.zeros(0, self._host.channels)
        return self._host.finished(self.readable(prepared, outcome, corpus, no_public, None, state))

    # ---- what a placeholder names, and what the layers read ----------------------------------------------------------------

    @locked
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> None:
        made_for, present = file.terms.host, type(self.model).__name__
        if not isinstance(file, ReleaseFile):
            raise ReleaseError(
                f"This is a release of texts, and the {present} is protected with mechanism={self.config.mechanism!r}. Call "
                f"dpx.unprotect(host) first, and load the release again ({STAYS})."
            )
        if present != made_for:
            raise ReleaseError(
                f"The release does not fit this model: it was made for a {made_for}, and this is a {present}. Load the model that it "
                "was made with."
            )
        current = self.fingerprint()
        for context in file.contexts:
            require_fit(context.foreign(current, projected=self._host.projects_rows))
        self.releases.adopt(file.contexts)

    def open(
        self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int
    ) -> GrowingContext:
        self._host.check_growing(contexts)
        return super().open(contexts, groups, horizon)

    def recipe_of(self, context: PrivateContext, horizon: int, state: Fingerprint) -> Recipe:
        """See `Grows`."""
        return self.prepare(state)

    def readable(
        self,
        recipe: Recipe,
        outcome: Released,
        context: PrivateContext,
        public: torch.Tensor,
        before: ReleasedContext | None,
        state: Fingerprint,
    ) -> ReleasedContext:
        """See `Grows`. The placeholder keeps its length."""
        promised = context.shown(outcome.guarantee)
        if before is None:
            exact, length = public.detach().clone(), context.public_length(self.config, self.hidden_length)
        else:
            exact, length = before.public_rows, before.rows
            if before.guarantee.rows is None:  # what hid its length is in the sum
                promised = dataclasses.replace(promised, rows=None)
        return ReleasedContext(outcome.structures, promised, exact, length, state, outcome.context)

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
        super().clear()

    # ---- report ------------------------------------------------------------------------------------------------------------

    def warnings(self) -> tuple[str, ...]:
        """Of the releases that are made now."""
        return self.maker.warnings(self.fingerprint())

    def report(self, entries: bool = True) -> PrivacyReport:
        """See `BaseGuard.report`."""
        heads = [layer.heads for layer in self._host.layers.values()]
        return self.releases.report(self.words(), heads, self.warnings(), entries)


def mark(module: Any, handle: Any) -> None:
    """Lets `handle_on` find the handle from this UNet, model, pipeline or part."""
    vars(module)[HANDLE_ATTRIBUTE] = handle


def unmark(module: Any, handle: Any) -> None:
    """Undoes `mark`, unless another handle has marked it since."""
    if handle_on(module) is handle:
        del vars(module)[HANDLE_ATTRIBUTE]


def handle_on(module: Any) -> Any:
    """What protects this UNet, model or pipeline: its handle, or None."""
    attributes: Mapping[str, Any] = getattr(module, "__dict__", {})
    return attributes.get(HANDLE_ATTRIBUTE)
