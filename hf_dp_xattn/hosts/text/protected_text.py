"""`ProtectedText`: the handle of a host that is served by released text. No attention is patched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from ...calibration.library.text_library import TextLibrary
from ...config import DPXAttnConfig
from ...errors import ConfigError, ProtectionLostError, ReleaseError
from ...mechanisms.library.library import NO_LIBRARY
from ...privacy.ledger import Budget, Ledger
from ...report import PrivacyReport
from ..access import Access
from ..accounts import PROTECT_AGAIN, STAYS
from ..context import Part, PrivateContext
from ..handle_base import Handle
from ..host_words import HostWords, Setting, text_words
from ..locks import Lock, locked
from ..making import ContextRecipe
from ..rehearsal import rehearse
from ..releases import Releases
from ..saving import SaveShadow
from ..storage import ReleaseFile
from ..terms import Terms, terms_of
from .released_texts import ReleasedText, ReleasedTexts, Shelf
from .text_contexts import Cut, name_text
from .text_release import TextRelease
from .text_release_file import TextReleaseFile
from .unit_encoders import PROBES, UnitEncoder, unit_encoder

if TYPE_CHECKING:
    from ...privacy.bits import Entropy


class Surface(Protocol):
    """Where one host takes in text, and how a release gets there.

    host: the pipeline or model. model: whose class a report names. each: units are charged under their own names as well. apart: a list of
    strings is ONE context of units, not several contexts.
    """

    host: Any
    model: Any
    each: bool
    apart: bool
    saving: SaveShadow

    def install(self) -> None: ...
    def remove(self) -> None: ...
    def lost(self) -> str | None:
        """What of its parts was replaced, or None."""
        ...

    def read_ids(self, context: Any) -> tuple[list[str], list[Part]] | None:
        """The units that a context of token ids spells, and the names of the ids; None where it holds none."""
        ...

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        """See `Release.inputs`. texts: of each context, and the public text beside it."""
        ...


class ProtectedText(Handle):
    """A host that reads released text in place of private text. Made by `dpx.protect`; a context manager that unprotects.

    A private text is cut in units, and each is answered once by an entry of a public library (charged to the ledger before it is encoded).
    The host then runs on these public texts as on any other, with all of its encoders, masks and caches; its text encoders, or the model
    itself, refuse to run on anything else.

    *Formal guarantee.* Everything that leaves the host about a private text is post-processing of its `TextRelease`, see `report()`.
    """

    def __init__(
        self,
        config: DPXAttnConfig,
        *,
        library: TextLibrary | None,
        encoder: Any = None,
        tokenizer: Any = None,
        host: Any = None,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        entropy: Entropy | None = None,
        serving_only: bool = False,
    ) -> None:
        if library is None and not serving_only:
            raise ConfigError(NO_LIBRARY)
        self.config, self.calibration = config, library
        self.access = Access()
        self.lock = Lock()
        self.calling = (
            Lock()
        )  # held while a pipeline runs that keeps a call's state on itself; taken before `lock`
        self.encode: UnitEncoder | None = None
        self._prepared: Callable[[int | None], ContextRecipe] | None = None
        if library is not None:
            library.check(config)
            self.encode = unit_encoder(host, tokenizer, encoder=encoder, permit=self.serving)
            library.check_encoder(self.encode)
            self._prepared = lru_cache(maxsize=16)(lambda n: ContextRecipe(library.prepare(config, n)))
            self._costs = self._prepared(1 if library.plan_for(config.epsilon).answers == 0 else None)
        grouping = "lines" if library is None else library.grouping
        self.cut = Cut(grouping if config.unit == "group" or library is not None else "context")
        self.releases: Releases[None, ContextRecipe, ReleasedTexts] = Releases(
            config,
            self,
            Shelf(),
            self.lock,
            ledger=ledger,
            budget=budget,
            entropy=entropy,
            serving_only=serving_only,
        )
        self.surfaces: list[Surface] = []
        self._told: list[ReleasedText] = []  # as `releases.spent`
        self.active = True

    @property
    def saving(self) -> SaveShadow:
        """Of the host that was protected first."""
        return self.surfaces[0].saving

    @property
    def model(self) -> Any:
        """The model or pipeline that was protected first; None where there is none."""
        return self.surfaces[0].model if self.surfaces else None

    # ---- installing and removing -------------------------------------------------------------------------------------------

    @locked
    def join(self, surface: Surface) -> None:
        """Adds a host, or another one that shares parts with it."""
        self.surfaces.append(surface)
        surface.install()

    def has(self, host: Any) -> bool:
        return any(surface.host is host for surface in self.surfaces)

    def unprotect(self) -> None:
        """Restores the host. Releases stay valid on disk."""
        with self.calling, self.lock:
            self.active = False
            for surface in self.surfaces:
                surface.remove()
            self.releases.clear()

    def __repr__(self) -> str:
        c, state = self.config, "active" if self.active else "unprotected"
        return (
            f"ProtectedText({state}, mechanism={c.mechanism!r}, epsilon={c.epsilon:g}, unit={c.unit!r}, "
            f"releases={len(self.releases.spent)})"
        )

    # ---- gates -------------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        lost = None if self.active else "it was unprotected"
        lost = lost or next((why for surface in self.surfaces if (why := surface.lost()) is not None), None)
        if lost is not None:
            raise ProtectionLostError(
                f"The protection is no longer in place: {lost}. Nothing was run. Undo that change, call dpx.unprotect(host), and "
                f"{PROTECT_AGAIN}."
            )

    check_thoroughly = check

    @contextmanager
    def public(self) -> Iterator[None]:
        """Inside, text is declared PUBLIC: nothing is released or charged, texts go to the host as they are.

        Holds for the running context (a thread, a task of asyncio, and what is copied from it meanwhile) until the block is left.
        """
        with self.access.enter("public"):
            yield

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, the host's gates are open: it runs on text that was released, or for a release that was charged."""
        with self.access.enter("encoding"):
            yield

    # ---- releases ----------------------------------------------------------------------------------------------------------

    @locked
    def release(
        self, context: Any, *, groups: str | None = None, fresh: bool = False, horizon: int | None = None
    ) -> TextRelease:
        """Releases private contexts as text, one budget each. A context that this handle released before is not charged again.

        Args:
            context: a string, which is cut in units as the library says; or a list of strings: for a diffusers pipeline one context each,
                for a language model (and with `groups`) the units of ONE context, which may also be lists of token ids.
            groups: "phrases", "segments" or "documents": the list is ONE context's units.
            fresh: release again with new coins; charged again.
            horizon: not supported.

        Raises:
            ContextError, ConfigError: not valid; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent or computed, for no context.
        """
        if horizon is not None:
            raise ConfigError("A release of texts does not grow: release each new text by itself.")
        if groups is not None and not isinstance(groups, str):
            raise ConfigError(
                'Units of a text are given as a list of strings, groups="phrases", "segments" or "documents".'
            )
        made = self.releases.make(self.name(context, apart=groups is not None), fresh=fresh)
        return TextRelease(made, self.config, self)

    def name(self, context: Any, *, apart: bool = False) -> list[PrivateContext]:
        """The private contexts that `context` holds; see `release`. Nothing is spent."""
        surface = self.surfaces[0] if self.surfaces else None
        others: list[Part] = []
        found = None if surface is None else surface.read_ids(context)
        if found is not None:
            context, others = found
            apart = True
        one = isinstance(context, str) or apart or surface is None or surface.apart
        each = surface is None or surface.each
        grouped = self.config.unit == "group"
        several = isinstance(context, (list, tuple)) and len(context) > 0 and not one
        listed = context if several else [context]
        return [
            name_text(*self.cut(c), self.encode, grouped=grouped, each=each, others=others) for c in listed
        ]

    # how a release is made (`releases.Making`)

    def current(self) -> None:
        """Nothing of a host's state matters to a text; but that it is protected."""
        self.check()

    def prepare(self, state: None) -> ContextRecipe:
        if self._prepared is None:
            raise ConfigError(NO_LIBRARY)
        return self._costs  # what any number of units costs

    def misfit(self, made: ReleasedTexts, state: None) -> str | None:
        return None

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None:
        """Whether the encoder runs, and whether contexts of so many units can be released; by public texts alone."""
        assert self.encode is not None and self._prepared is not None
        due, code = list(contexts), self.encode(PROBES[:1])
        for context in due:
            recipe = self._prepared(None if self.config.unit == "group" else context.rows)
            recipe.prepared.count(code.expand(context.rows, -1), context.phrases)
        rehearse(due, code.shape[-1], self.config)

    def run(
        self,
        prepared: ContextRecipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: None,
        entropy: Entropy | None,
    ) -> ReleasedTexts:
        """Encodes and releases one charged context; keeps nothing of it but the release."""
        assert self._prepared is not None
        if groups is None:  # one unit, which may be answered part by part
            prepared = self._prepared(context.rows)
        made = prepared.run(context.load()[0], groups, entropy)
        text = ReleasedText(made.texts, self.cut.joint)
        self._told.append(text)
        return ReleasedTexts(text, made.guarantee)

    @locked
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> TextRelease:
        """A release that was made elsewhere, for any host. Raises ReleaseError where it is none of texts."""
        if not isinstance(file, TextReleaseFile):
            raise ReleaseError(
                "This release is not of texts, and the host is protected with mechanism='library'. Call dpx.unprotect(host) first, and "
                f"load the release again ({STAYS})."
            )
        self.releases.adopt(file.contexts)
        self._told += [c.text for c in file.contexts]
        return TextRelease(file.contexts, file.config, self, terms=file.terms)

    def append(self, growing: Any, context: Any, groups: Any) -> NoReturn:
        """Raises ReleaseError: a release of texts does not grow."""
        raise ReleaseError("A release of texts does not grow: release the new text by itself.")

    def inputs(self, release: Any, prompt: str | Sequence[str] | None, **public: Any) -> dict[str, Any]:
        """See `Release.inputs`: arguments of the host that hold the released text, and what is public."""
        self.check()
        if not isinstance(release, TextRelease) or not self.surfaces:
            raise ReleaseError("This release has no host to give inputs to: read release.texts.")
        beside: list[tuple[Any, str | None]] = list(release.beside(prompt))
        return self.surfaces[0].inputs([(c.text, p) for c, p in beside], **public)

    # ---- report ------------------------------------------------------------------------------------------------------------

    def report(self) -> PrivacyReport:
        """What was promised, spent and left open, and the released texts, which are public. str(), to_dict(), to_json()."""
        made = self.releases.report(self.words(), [], ())
        entries = [
            {**entry, "text": list(text)} for entry, text in zip(made.releases, self._told, strict=True)
        ]
        return dataclasses.replace(made, releases=tuple(entries))

    def terms(self) -> Terms:
        """What a release carries along about its host."""
        return terms_of(self.report(), [self.model])

    def words(self) -> HostWords:
        """What is public and what is not covered here."""
        name = "no host: the text is for any" if self.model is None else type(self.model).__name__
        return text_words(name, Setting.of(self.config, self.calibration), self.cut.words)
