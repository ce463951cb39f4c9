"""`TextGuard`: how the releases of a host are made that is served by released text. No attention is patched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ...calibration.library.text_library import TextLibrary
from ...errors import ConfigError, ReleaseError
from ...mechanisms.base import Released
from ...mechanisms.library.library import NO_LIBRARY, FromLibrary
from ...report import PrivacyReport
from ..accounts import STAYS, Settings
from ..base_guard import BaseGuard, Guarded
from ..context import PrivateContext
from ..growing import GrowingContext
from ..locks import locked
from ..making import ContextRecipe, Recipe
from ..rehearsal import rehearse
from .released_texts import ReleasedText, ReleasedTexts, Shelf
from .text_contexts import Cut
from .text_release_file import TextReleaseFile
from .unit_encoders import UnitEncoder, unit_encoder

if TYPE_CHECKING:
    from ...privacy.bits import Entropy
    from ..saving import SaveShadow
    from ..storage import ReleaseFile


class GuardedText(Guarded, Protocol):
    """What it asks of its host beside."""

    @property
    def saving(self) -> SaveShadow: ...


class TextGuard(BaseGuard[None, ContextRecipe, ReleasedTexts]):
    """A private text is cut in units, and each is answered once by an entry of a public library, charged before it is encoded.

    cut: in which units. encode: makes their codes; None where releases are served only.
    """

    _host: GuardedText

    def __init__(self, host: GuardedText, settings: Settings, encoder: Any, tokenizer: Any) -> None:
        library, config = settings.calibration, settings.config
        if library is not None and not isinstance(library, TextLibrary):
            raise ConfigError(
                f"This calibration is for mechanism={library.mechanism!r}, the config says {config.mechanism!r}: change the config, or "
                "make a library (dpx.calibrate(host, public_contexts, config))."
            )
        if library is None and not settings.serving_only:
            raise ConfigError(NO_LIBRARY)
        super().__init__(host, settings, Shelf())
        self.encode: UnitEncoder | None = None
        self._prepared: Callable[[int | None], ContextRecipe] | None = None
        if library is not None:
            library.check(config)
            self.encode = unit_encoder(host.model, tokenizer, encoder=encoder, permit=self.serving)
            library.check_encoder(self.encode.public)
            self._prepared = lru_cache(maxsize=16)(lambda n: ContextRecipe(library.prepare_list(config, n)))
        grouping = "lines" if library is None else library.grouping
        self.cut = Cut(grouping if config.unit == "group" or library is not None else "context")
        self._released: list[ReleasedTexts | GrowingContext] = []  # as `releases.spent`

    @property
    def saving(self) -> SaveShadow:
        return self._host.saving

    def encoding(self) -> Any:
        raise ConfigError(
            "This host reads released text only: what it would make of a private one could not be released. Give the text to "
            "protected.release."
        )

    # ---- how a release is made (`releases.Making`) -------------------------------------------------------------------------

    def current(self) -> None:
        """Nothing of a host's state matters to a text; but that it is protected."""
        self.check()

    def prepare(self, state: None) -> ContextRecipe:
        if self._prepared is None:
            raise ConfigError(NO_LIBRARY)
        assert isinstance(self.calibration, TextLibrary)
        return self._prepared(1 if self.calibration.plan_for(self.config.epsilon).answers == 0 else None)

    def prepared_for(self, prepared: ContextRecipe, context: PrivateContext) -> ContextRecipe:
        """By the number of its units, which is looked at where it is public alone: answers, votes, or answers to parts, each of which
        costs what it costs."""
        assert self._prepared is not None and isinstance(self.calibration, TextLibrary)
        units = context.rows
        if self.config.unit == "context":  # one unit, which may be answered part by part
            return self._prepared(units)
        if self.config.neighboring != "replace_one" or self.calibration.votes_for(self.config, units) is None:
            return prepared
        return self._prepared(units)

    def misfit(self, released: ReleasedTexts, state: None) -> str | None:
        return None

    def rehearse(self, contexts: Iterable[PrivateContext]) -> None:
        """Whether the encoder runs, and whether contexts of so many units can be released; by public texts alone."""
        assert self.encode is not None
        due, code, general = list(contexts), self.encode.trial(), self.prepare(None)
        if due:
            self.check_codes()
        for context in due:
            recipe = self.prepared_for(general, context)
            recipe.prepared.count(code.expand(context.rows, -1), context.phrases)
        rehearse(due, code.shape[-1], self.config)

    def check_codes(self) -> None:
        """Whether the encoder still gives the library's codes: an adapter that was loaded since would make noise of answers."""
        assert self.encode is not None and isinstance(self.calibration, TextLibrary)
        try:
            self.calibration.check_encoder(self.encode.public)
        except ConfigError as error:
            raise ConfigError(
                f"The text encoder has changed since this host was protected. {error} Nothing was spent."
            ) from None

    def run(
        self,
        prepared: ContextRecipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: None,
        entropy: Entropy | None,
    ) -> ReleasedTexts:
        """Encodes and releases one charged context; keeps nothing of it but the release."""
        released = self._texts(prepared, prepared.run(context.load()[0], groups, entropy))
        self._released.append(released)
        return released

    def of_corpus(
        self, prepared: ContextRecipe, outcome: Released, corpus: PrivateContext, state: None
    ) -> ReleasedTexts:
        released = self._texts(prepared, outcome)
        self._released.append(released)
        return released

    def _texts(self, recipe: Recipe, outcome: Released) -> ReleasedTexts:
        counted = isinstance(recipe.prepared, FromLibrary) and recipe.prepared.counted
        text = (ReleasedText.counted if counted else ReleasedText)(outcome.texts, self.cut.joint)
        return ReleasedTexts(text, outcome.guarantee)

    # ---- a list that grows (`growing.Grows`) -------------------------------------------------------------------------------

    def recipe_of(self, context: PrivateContext, horizon: int, state: None) -> Recipe:
        """By as many units as there would be if each append had those of the first one: votes, or an answer for each unit."""
        if self._prepared is None or self.config.unit == "context":
            return self.prepare(state)
        return self._prepared(context.rows * horizon)

    def verify(self, contexts: Iterable[ReleasedTexts]) -> None:
        self.check()

    def readable(
        self,
        recipe: Recipe,
        outcome: Released,
        context: PrivateContext,
        public: torch.Tensor,
        before: ReleasedTexts | None,
        state: None,
    ) -> ReleasedTexts:
        return self._texts(recipe, outcome)

    def open(
        self, contexts: Sequence[PrivateContext], groups: torch.Tensor | None, horizon: int
    ) -> GrowingContext:
        growing = super().open(contexts, groups, horizon)
        self._released.append(growing)
        return growing

    @locked
    def take_in(self, file: ReleaseFile | TextReleaseFile) -> None:
        if not isinstance(file, TextReleaseFile):
            raise ReleaseError(
                "This release is not of texts, and the host is protected with mechanism='library'. Call dpx.unprotect(host) first, and "
                f"load the release again ({STAYS})."
            )
        self.releases.adopt(file.contexts)
        self._released += file.contexts

    def report(self, entries: bool = True) -> PrivacyReport:
        """With the released texts, which are public."""
        report = super().report(entries)
        if not entries:
            return report
        texts = [r.latest.text if isinstance(r, GrowingContext) else r.text for r in self._released]
        shown = [{**entry, **text.shown()} for entry, text in zip(report.releases, texts, strict=True)]
        return dataclasses.replace(report, releases=tuple(shown))
