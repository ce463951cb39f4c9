"""`Host`: what a kind of host says of itself. A new one is a subclass beside its siblings, and a line in `host_registry.py`.

A handle (`protected.Protected`) holds one. The host installs gates and says what they hand on; all that is private goes through the `Guard`
that it is installed with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import nn

from .accounts import PROTECT_AGAIN
from .context import PrivateContext
from .fingerprint import Fingerprint
from .guard import Guard, handle_on
from .host_words import HostWords, Setting
from .layer import Layer
from .lengths import HIDDEN
from .making import Maker
from .released import ReleasedContext
from .weights import Weights

Family = Literal["diffusers", "encoder-decoder", "decoder-only", "image-text"]


class Named(NamedTuple):
    """Contexts, validated and named; and groups [n] of their rows that the contexts do not know by themselves."""

    contexts: list[PrivateContext]
    groups: torch.Tensor | None


class Readable(Protocol):
    """A release as a host reads it."""

    @property
    def contexts(self) -> tuple[ReleasedContext, ...]: ...
    def beside(self, prompt: Any) -> list[tuple[ReleasedContext, str | None]]:
        """Each context with the public text that joins it."""
        ...


class Host(ABC):
    """One UNet or model.

    projects_rows: its layers make keys and values of rows of context space by their present weights. undo: what to do where the protection
    was lost. layers: by name, those that read a context. originals: what stood in each of
    them before, a processor or a config. weights: those that a release must fit. guard: from `install` on.
    """

    family: ClassVar[Family]
    projects_rows: ClassVar[bool] = True
    undo: ClassVar[str] = f"Undo that change, call dpx.unprotect(model), and {PROTECT_AGAIN}."
    keeps_sketch: ClassVar[bool] = True
    guard: Guard
    originals: dict[str, Any]

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedModelError where the model is not supported; it is left as it was."""
        self.model = model
        self.layers = self.find_layers()
        self.weights = Weights(model, self.watched, self.sketch, kept=self.keeps_sketch)

    # ---- what it is --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def find_layers(self) -> dict[str, Layer]:
        """The layers that read a context, in module order. Raises UnsupportedModelError."""

    @abstractmethod
    def watched(self) -> list[nn.Module]:
        """The modules whose weights a release must fit, as they are now."""

    @abstractmethod
    def sketch(self) -> Fingerprint:
        """Of the watched weights."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of a row of context space."""

    @property
    def hidden_length(self) -> int:
        """Length of a placeholder that must not tell how many rows there are."""
        return HIDDEN

    @property
    def text(self) -> Any:
        """The text side of its pipeline; None where there is none."""
        return None

    @property
    def parts(self) -> list[Any]:
        """The pipeline or model and its parts, of which one may know its Hub id."""
        return [self.model]

    # ---- installing and removing -------------------------------------------------------------------------------------------

    @abstractmethod
    def install(self, guard: Guard) -> None:
        """Closes every way that a context has to the layers but through the guard."""
        self.guard = guard

    @abstractmethod
    def remove(self) -> None:
        """Takes off all that was installed."""

    @abstractmethod
    def lost(self) -> str | None:
        """What of it is no longer in place, in words; or None."""

    def changed(self) -> str | None:
        """What the model has gained since that a guarantee does not cover: a sentence without its end; or None."""
        return None

    def has(self, pipe: Any) -> bool:
        """Whether a pipeline around the model has joined."""
        return True

    def side_of(self, pipe: Any, maker: Maker) -> Any:
        """The text side of a pipeline that may join; nothing is patched. Raises UnsupportedModelError, or ConfigError where the calibration
        is for another text encoder."""
        return None

    def join(self, pipe: Any, side: Any) -> None:
        """Adds a pipeline around the model."""
        return

    @property
    def is_held(self) -> bool:
        """Whether the model still names the handle of this guard."""
        return getattr(handle_on(self.model), "guard", None) is self.guard

    # ---- private contexts --------------------------------------------------------------------------------------------------

    @abstractmethod
    def name(self, context: Any, groups: Any, **named: Any) -> Named:
        """Validates and names what `Protected.release` is given. Raises ContextError, ConfigError; nothing was spent."""

    def check_growing(self, contexts: Sequence[PrivateContext]) -> None:
        """Raises ConfigError where they cannot grow."""
        return

    def finished(self, released: ReleasedContext) -> ReleasedContext:
        """A release as its layers read it."""
        return released

    # ---- what is read ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def inputs(self, release: Readable, prompt: Any, **public: Any) -> dict[str, Any]:
        """See `Release.inputs`."""

    @abstractmethod
    def words(self, setting: Setting) -> HostWords:
        """What is public and what is not covered here."""
