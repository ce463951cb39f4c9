"""Which surfaces there are, by which hosts take in text: the one place to add another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..content_names import Part
from .chat_swap import ChatSwap
from .generate_gate import GenerateGate
from .prompt_swap import Names, PromptSwap
from .released_texts import ReleasedText

if TYPE_CHECKING:
    from ..saving import SaveShadow
    from .text_guard import TextGuard

SUPPORTED = (
    "With mechanism='library' a host is a diffusers pipeline with a `prompt`, a text-generation pipeline of transformers, a model of "
    "transformers that generates text from text, or None (the released text is for a host that is elsewhere)."
)


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

    @classmethod
    def matches(cls, host: Any) -> bool:
        """Whether it is what a host takes text in by."""
        ...

    @classmethod
    def parts(cls, host: Any) -> Sequence[Any]:
        """What of a host it closes beside the host itself, and other hosts may share."""
        ...

    @classmethod
    def around(cls, host: Any, namer: Names, guard: TextGuard, tokenizer: Any) -> Self:
        """Of a host; nothing is patched. tokenizer: that `protect` was given. Raises UnsupportedModelError."""
        ...

    def install(self, handle: Any) -> None: ...
    def remove(self) -> None: ...
    def lost(self) -> str | None:
        """What of its parts was replaced, or None."""
        ...

    def read_ids(self, context: Any) -> tuple[list[str], list[Part]] | None:
        """The units that a context of token ids spells, and the names of the ids; None where it holds none."""
        ...

    def ids_of(self, units: Sequence[str], whole: str) -> list[Part]:
        """The names of the token ids that a text is of, where it could be given as such."""
        ...

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        """See `Release.inputs`. texts: of each context, and the public text beside it."""
        ...


# the first that matches
SURFACES: tuple[type[Surface], ...] = (PromptSwap, ChatSwap, GenerateGate)


def surface_of(host: Any) -> type[Surface] | None:
    """The class of a host's surface; None where no text can be released for it."""
    return next((surface for surface in SURFACES if surface.matches(host)), None)
