"""`RoutedHandle`: what the handles of all protected transformers models share."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, ClassVar

import torch

from ...errors import ConfigError, ProtectionLostError
from ...mechanisms.rows_structure import as_rows
from ...privacy.bits import Entropy
from ..accounts import PROTECT_AGAIN
from ..context import PrivateContext
from ..fingerprint import Fingerprint
from ..handle import HANDLE_ATTRIBUTE, ProtectedPipeline
from ..locks import locked
from ..making import Recipe
from ..nan import main_output, refuse_nan
from ..released import ReleasedContext
from .routing import Routing, route


class RoutedHandle(ProtectedPipeline):
    """Installing, checking and removing what all protected transformers models share.

    A subclass sets `routing`, `_generate` (a shadow of the model's generate) and `_calls` (the forward that each thread is in), finds
    layers with a `module` each, and says what its attention function finds on a module.
    """

    routing: ClassVar[Routing]
    _generate: Any
    _calls: Any

    def __init__(self, model: Any, *settings: Any, **options: Any) -> None:
        self.model = model  # a PreTrainedModel; mypy does not see through its mixins
        super().__init__(model, *settings, **options)
        layers: dict[str, Any] = self.layers
        self._modules: dict[str, Any] = {name: layer.module for name, layer in layers.items()}
        self._configs = {name: module.config for name, module in self._modules.items()}
        self._routes = {name: route(config, self.routing.name) for name, config in self._configs.items()}
        self._hooks: list[Any] = []

    def _layer_state(self, name: str) -> Any:
        """What the attention function finds on the module of this layer."""
        raise NotImplementedError

    def _close(self) -> None:
        """Closes other ways to what is private."""

    def _opened(self) -> str | None:
        """Which of them is open again, or None."""
        return None

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's gate. Raises before anything runs."""
        raise NotImplementedError

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        call, self._calls.current = self._calls.current, None
        if call is not None and not call.public and output is not None:  # None: it failed
            refuse_nan(main_output(output))

    # ---- installing and removing -------------------------------------------------------------------------------------------

    @locked
    def install(self) -> None:
        """Routes the layers' attention and closes other ways; undone by `unprotect`."""
        for message in self._maker.warnings(self._fingerprint):
            warnings.warn(message, stacklevel=5)
        self.active = True
        self.model.__dict__[HANDLE_ATTRIBUTE] = self
        for name, module in self._modules.items():
            module.__dict__[self.routing.attribute] = self._layer_state(name)
            module.config = self._routes[name]
        self._close()
        self._hooks = [
            self.model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]
        self._generate.install()
        self.saving.install()

    def _restore(self) -> None:
        """The original configs of its layers, no hooks, no attributes."""
        self.active = False
        for name, module in self._modules.items():
            if module.config is self._routes[name]:
                module.config = self._configs[name]
            module.__dict__.pop(self.routing.attribute, None)
        for installed in (*self._hooks, *self._gates, self._generate, self.saving):
            installed.remove()
        self.model.__dict__.pop(HANDLE_ATTRIBUTE, None)
        self._calls = type(self._calls)()  # what was served, by all threads
        self._tables.clear()
        self.promises.clear()
        self.releases.clear()

    # ---- gates -------------------------------------------------------------------------------------------------------------

    @locked  # a release routes modules for a moment
    def check(self) -> None:
        """Raises `ProtectionLostError` unless everything that `protect` installed is still in place."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        hooks = (self.model._forward_pre_hooks, self.model._forward_hooks)
        lost: str | None = None
        if not self.active:
            lost = "it was unprotected"
        elif self.model.__dict__.get(HANDLE_ATTRIBUTE) is not self or any(
            hook.id not in known for hook, known in zip(self._hooks, hooks, strict=True)
        ):
            lost = "the gate of the model was removed"
        elif not self._generate.installed():
            lost = "generate was replaced"
        elif (opened := self._opened()) is not None:
            lost = opened
        elif ALL_ATTENTION_FUNCTIONS.get(self.routing.name) is not self.routing.function:
            lost = f"another attention function was registered as {self.routing.name!r}"
        else:
            lost = next((reason for name in self._modules if (reason := self._lost_layer(name))), None)
        if lost is not None:
            raise ProtectionLostError(
                f"The protection is no longer in place: {lost}. Nothing was run. Undo that change, call dpx.unprotect(model), and "
                f"{PROTECT_AGAIN}."
            )

    def _lost_layer(self, name: str) -> str | None:
        module = self._modules[name]
        if module.config is not self._routes[name] or module.config._attn_implementation != self.routing.name:
            return f"the attention function of {name} was replaced"
        if self.routing.attribute not in module.__dict__ or self.model.get_submodule(name) is not module:
            return f"{name} was replaced"
        return None

    def refuse_checkpointing(self, module: Any) -> None:
        """Raises ConfigError where a forward would be run again for its gradient, when nothing says any more what it may read."""
        if not (module.training and torch.is_grad_enabled()):
            return
        if any(getattr(part, "gradient_checkpointing", False) and part.training for part in module.modules()):
            raise ConfigError(
                "Gradient checkpointing is not supported on a protected model: the backward pass would run its layers again, outside of "
                "the call that names the release. Call model.gradient_checkpointing_disable() and train with smaller batches, or train "
                "the model before it is protected."
            )

    # ---- releases ----------------------------------------------------------------------------------------------------------

    def run(
        self,
        prepared: Recipe,
        context: PrivateContext,
        groups: torch.Tensor | None,
        state: Fingerprint,
        entropy: Entropy | None,
    ) -> ReleasedContext:
        released = super().run(prepared, context, groups, state, entropy)
        return dataclasses.replace(released, structures=tuple(map(as_rows, released.structures)))
