"""`TextHost`: whatever is served by released text, and what takes in private text for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, ContextError, ReleaseError, UnsupportedModelError
from ...records import plain_text
from ..accounts import PROTECT_AGAIN, Settings
from ..content_names import Part
from ..corpus import Document
from ..diffusers.architectures import unwrap
from ..guard import handle_on
from ..host import Host, Named, Readable
from ..host_words import HostWords, Setting, text_words
from .chat_swap import ChatSwap
from .prompt_swap import PromptSwap
from .released_texts import ReleasedTexts
from .surfaces import SUPPORTED, Surface, surface_of
from .text_contexts import CUTS, name_text
from .text_guard import TextGuard

if TYPE_CHECKING:
    from ..saving import SaveShadow


class TextHost(Host):
    """Pipelines and models that share parts, or None.

    Args:
        model: what is protected first.
        tokenizer, encoder: see `protect`.
    """

    undo = f"Undo that change, call dpx.unprotect(host), and {PROTECT_AGAIN}."
    guard: TextGuard

    def __init__(self, model: Any, tokenizer: Any = None, encoder: Any = None) -> None:
        self.first, self._tokenizer, self._encoder = model, tokenizer, encoder
        self._surfaces: list[Surface] = []

    @property
    def model(self) -> Any:
        return self._surfaces[0].model if self._surfaces else self.first

    def guarded(self, settings: Settings) -> TextGuard:
        return TextGuard(self, settings, self._encoder, self._tokenizer)

    @property
    def saving(self) -> SaveShadow:
        """Of the host that was protected first."""
        return self._surfaces[0].saving

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def has(self, pipe: Any) -> bool:
        return any(surface.host is pipe for surface in self._surfaces)

    def side_of(self, pipe: Any, guard: TextGuard) -> Surface:
        surface = surface_of(pipe)
        if surface is None:
            raise UnsupportedModelError(
                f"{type(unwrap(pipe)).__name__} cannot be protected. {SUPPORTED} Nothing was patched."
            )
        return surface.around(pipe, self, guard, self._tokenizer)

    def join(self, pipe: Any, side: Surface, handle: Any) -> None:
        with self.guard.lock:
            self._surfaces.append(side)
            side.install(handle)

    def remove(self) -> None:
        for surface in self._surfaces:
            surface.remove()

    def draws_with(self, model: Any) -> bool:
        """Whether a pipeline that joined has this model."""
        return any(isinstance(s, PromptSwap) and s.draws_with(model) for s in self._surfaces)

    def lost(self) -> str | None:
        return next((why for surface in self._surfaces if (why := surface.lost()) is not None), None)

    # ---- what is private, and what is read ---------------------------------------------------------------------------------

    def name(self, context: Any, groups: Any = None, **named: Any) -> Named:
        """A string, which is cut in units as the library says; or a list of strings: for a diffusers pipeline one context each, for a
        language model (and with `groups`) the units of ONE context, which may also be lists of token ids."""
        if named:
            raise TypeError(f"A text is released without {', '.join(sorted(named))}.")
        if groups is not None and not isinstance(groups, str):
            raise ConfigError(
                'Units of a text are given as a list of strings, groups="phrases", "segments" or "documents".'
            )
        surface = self._surfaces[0] if self._surfaces else None
        others: list[Part] = []
        apart = groups is not None
        spelled = None if surface is None else surface.read_ids(context)
        if spelled is not None:
            (context, others), apart = spelled, True
        one = isinstance(context, str) or apart or surface is None or surface.apart
        guard = self.guard
        # a phrase that many prompts hold would spend its budget with the first ones; a document is somebody's
        each = surface is None or surface.each or groups == "documents" or guard.cut.grouping == "documents"
        grouped = guard.config.unit == "group"
        several = isinstance(context, (list, tuple)) and len(context) > 0 and not one
        listed = context if several else [context]
        self._check_groups(groups, cut=any(isinstance(c, str) for c in listed))
        contexts = []
        for units, whole in map(guard.cut, listed):
            ids = others if surface is None or spelled is not None else surface.ids_of(units, whole)
            contexts.append(name_text(units, whole, guard.encode, grouped=grouped, each=each, others=ids))
        return Named(contexts, None)

    def _check_groups(self, groups: str | None, *, cut: bool) -> None:
        """Raises ConfigError where `groups` names other units than are answered. cut: whether a string is cut by the library's rule."""
        split, _, where = CUTS[self.guard.cut.grouping]
        if groups is not None and (groups not in CUTS or (cut and CUTS[groups][0] is not split)):
            raise ConfigError(
                f"groups={groups!r} names other units than those that are answered: this library cuts a text {where}, and each piece is a "
                "unit with an epsilon of its own. Give units as a list of strings, or make a library with another `grouping`. Nothing was "
                "spent."
            )

    def document(self, document: Any) -> Document:
        """A string, or a row of a dataset with a column "text" (or one column of strings)."""
        text = document
        if isinstance(document, Mapping):
            strings = [name for name, value in document.items() if isinstance(value, str)]
            if "text" not in strings and len(strings) != 1:
                raise ConfigError(
                    f"Which column holds the documents? They are read from `text`, or from the only column of strings; here: "
                    f"{', '.join(map(str, document))}. Take dataset.select_columns([name]). Nothing was spent."
                )
            text = document["text" if "text" in strings else strings[0]]
        if not isinstance(text, str) or not plain_text(text).strip():
            raise ContextError("A document is a string that is not empty. Nothing was spent.")
        unit = plain_text(text).strip()
        ids = self._surfaces[0].ids_of([unit], unit) if self._surfaces else []
        context = name_text([unit], unit, self.guard.encode, grouped=True, each=False, others=ids)
        groups = context.phrases
        return Document(context, tuple(p for p in context.charged(groups) if p.name != context.name))

    def inputs(self, release: Readable, prompt: Any, **public: Any) -> dict[str, Any]:
        if not self._surfaces or not all(isinstance(c, ReleasedTexts) for c in release.contexts):
            raise ReleaseError("This release has no host to give inputs to: read release.texts.")
        return self._surfaces[0].inputs([(c.text, p) for c, p in release.beside(prompt)], **public)

    def chat(
        self, release: Callable[..., Any], tokenizer: Any, messages: Any, public_system: bool, **options: Any
    ) -> str:
        from transformers import PreTrainedModel, TextGenerationPipeline

        model = unwrap(self.model)
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
            return super().chat(release, tokenizer, messages, public_system, **options)
        known = (s for s in self._surfaces if isinstance(s, ChatSwap) and s.host.tokenizer is tokenizer)
        swap: Any = next(known, None)
        if swap is None:
            pipe = TextGenerationPipeline(model=model, tokenizer=tokenizer)
            swap = self.side_of(pipe, self.guard)
            self.join(pipe, swap, handle_on(model))
        answer = swap.host(list(messages), public_system=public_system, **options)
        return str(answer[0]["generated_text"][-1]["content"])

    def words(self, setting: Setting) -> HostWords:
        name = "no host: the text is for any" if self.model is None else type(self.model).__name__
        return text_words(name, setting, self.guard.cut.words)


def handle_of_parts(host: Any) -> Any:
    """The handle of a part that a host shares with one that is protected by released text; None where there is none."""
    surface = surface_of(host)
    parts = [host, *(() if surface is None else surface.parts(host))]
    handles = [handle_on(p) for p in map(unwrap, parts)]
    return next((handle for handle in handles if handle is not None), None)
