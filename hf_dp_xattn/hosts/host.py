"""`Host`: what a kind of host says of itself. A new one is a subclass beside its siblings, and a line in `host_registry.py`.

A handle (`protected.Protected`) holds one, and the guard that was made for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from ..errors import ConfigError
from .accounts import PROTECT_AGAIN, Settings
from .base_guard import BaseGuard
from .context import PrivateContext
from .corpus import Document
from .host_words import HostWords, Setting


class Named(NamedTuple):
    """Contexts, validated and named; and groups [n] of their rows that the contexts do not know by themselves."""

    contexts: list[PrivateContext]
    groups: torch.Tensor | None


class Readable(Protocol):
    """A release as a host reads it."""

    @property
    def contexts(self) -> tuple[Any, ...]: ...
    def beside(self, prompt: Any) -> list[tuple[Any, str | None]]:
        """Each context with the public text that joins it."""
        ...


class Host(ABC):
    """A UNet or model (`layer_host.LayerHost`), or whatever reads released text (`text.text_host.TextHost`).

    undo: what to do where the protection was lost. adapts_pipelines: it is of pipelines, not of their models. layers: those that
    read a private context, by name. guard: from `install` on.
    """

    undo: ClassVar[str] = f"Undo that change, call dpx.unprotect(model), and {PROTECT_AGAIN}."
    adapts_pipelines: ClassVar[bool] = False
    model: Any
    layers: Mapping[str, Any] = {}
    guard: Any

    @abstractmethod
    def guarded(self, settings: Settings) -> BaseGuard[Any, Any, Any]:
        """Its guard. Raises ConfigError where the settings are not for this host; it is left as it was."""

    @property
    def text(self) -> Any:
        """The text side of its pipeline; None where there is none."""
        return None

    @property
    def parts(self) -> list[Any]:
        """The pipeline or model and its parts, of which one may know its Hub id."""
        return [self.model]

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self, guard: Any, handle: Any) -> None:
        """Closes every way that a context has into the model but through the guard. handle: found on the model while it lasts."""
        self.guard = guard

    @abstractmethod
    def remove(self) -> None:
        """Takes off all that was installed."""

    @abstractmethod
    def lost(self) -> str | None:
        """What of it is no longer in place, in words; or None."""

    def has(self, pipe: Any) -> bool:
        """Whether a pipeline around the model has joined."""
        return True

    def side_of(self, pipe: Any, guard: Any) -> Any:
        """What takes in private text for a pipeline that may join; nothing is patched. Raises UnsupportedModelError, or ConfigError where
        the calibration is for another text encoder."""
        return None

    def join(self, pipe: Any, side: Any, handle: Any) -> None:
        """Adds a pipeline around the model. side: of `side_of`. handle: found on its parts while it lasts."""
        return

    # ---- what is private, and what is read ---------------------------------------------------------------------------------

    @abstractmethod
    def name(self, context: Any, groups: Any, **named: Any) -> Named:
        """Validates and names what `Protected.release` is given. Raises ContextError, ConfigError; nothing was spent."""

    def document(self, document: Any) -> Document:
        """Validates and names one document of a corpus. Raises ContextError, ConfigError; nothing was spent."""
        raise ConfigError(
            f"{type(self.model).__name__} takes no corpus: protect an encoder-decoder model, or with mechanism='library' any host. Nothing "
            "was spent."
        )

    def weighted(self, texts: Sequence[str], weights: Sequence[float]) -> PrivateContext:
        """See `Protected.private_encode`. Raises ConfigError, ContextError; nothing was spent."""
        raise ConfigError(
            f"{type(self.model).__name__} takes no weighted text: private_encode is for pipelines of Stable Diffusion (1, 2, XL and kin) "
            "and mechanisms on attention. Text that mechanism='library' releases is public: weight it as you like. Nothing was spent."
        )

    @abstractmethod
    def inputs(self, release: Readable, prompt: Any, **public: Any) -> dict[str, Any]:
        """See `Release.inputs`."""

    def chat(
        self, release: Callable[..., Any], tokenizer: Any, messages: Any, public_system: bool, **options: Any
    ) -> str:
        """See `Protected.chat`. release: of the handle."""
        raise ConfigError(
            f"{type(self.model).__name__} takes no chat: protect a decoder-only model, or with mechanism='library' a model that generates "
            "text. Nothing was spent."
        )

    @abstractmethod
    def words(self, setting: Setting) -> HostWords:
        """What is public and what is not covered here."""
