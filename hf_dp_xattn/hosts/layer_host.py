"""`LayerHost`: a UNet or model whose layers read a context, from its release and from nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .accounts import Settings
from .context import PrivateContext
from .fingerprint import Fingerprint
from .guard import Guard, handle_on, mark, unmark
from .host import Host
from .layer import Layer
from .lengths import HIDDEN
from .released import ReleasedContext
from .weights import Weights


class LayerHost(Host):
    """One UNet or model. The host installs gates and says what they hand on; all that is private goes through its `Guard`.

    projects_rows: its layers make keys and values of rows of context space by their present weights. layers: by name, those that read a
    context. originals: what stood in each of them before, a processor or a config. weights: those that a release must fit.
    """

    projects_rows: ClassVar[bool] = True
    keeps_sketch: ClassVar[bool] = True
    guard: Guard
    layers: dict[str, Layer]
    originals: dict[str, Any]

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedModelError where the model is not supported; it is left as it was."""
        self.model = model
        self.layers = self.find_layers()
        self.weights = Weights(model, self.watched, self.sketch, kept=self.keeps_sketch)

    def guarded(self, settings: Settings) -> Guard:
        return Guard(self, settings)

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

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self, guard: Any, handle: Any) -> None:
        super().install(guard, handle)
        mark(self.model, handle)
        self.guard.saving.install()

    def remove(self) -> None:
        self.guard.saving.remove()
        if self.is_held:
            unmark(self.model, handle_on(self.model))

    def changed(self) -> str | None:
        """What the model has gained since that a guarantee does not cover: a sentence without its end; or None."""
        return None

    @property
    def is_held(self) -> bool:
        """Whether the model still names the handle of this guard."""
        return getattr(handle_on(self.model), "guard", None) is self.guard

    # ---- private contexts --------------------------------------------------------------------------------------------------

    def check_growing(self, contexts: Sequence[PrivateContext]) -> None:
        """Raises ConfigError where they cannot grow."""
        return

    def finished(self, released: ReleasedContext) -> ReleasedContext:
        """A release as its layers read it."""
        return released
