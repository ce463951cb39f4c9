"""`RoutedHost`: what all models of transformers share as hosts."""

from __future__ import annotations

import dataclasses
import inspect
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import ConfigError, ProtectionLostError
from ...mechanisms.rows_structure import as_rows
from ..guard import Guard
from ..layer_host import LayerHost
from ..model_gates import TextGate
from ..nan import main_output, refuse_nan
from ..recorded_runs import refuse_recording
from ..released import ReleasedContext
from ..shadows import Shadows
from .generating import ThreadCalls, named_arguments
from .routing import Routing, route


class RoutedHost(LayerHost):
    """Its layers' attention is routed to a function of ours, which reads what the gate on its forward has said.

    routing: the function. never_traced: what is said to torch.compile. calls: the forward that each thread is in. generate: its shadow.
    """

    routing: ClassVar[Routing]
    never_traced: ClassVar[str]
    calls: ThreadCalls
    generate: Shadows

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._modules: dict[str, Any] = {name: layer.module for name, layer in self.layers.items()}
        self.originals = {name: module.config for name, module in self._modules.items()}
        self._routes = {name: route(config, self.routing.name) for name, config in self.originals.items()}
        self._hooks: list[Any] = []
        self._gates: list[TextGate] = []

    @abstractmethod
    def layer_state(self, name: str) -> Any:
        """What the attention function finds on the module of this layer."""

    @abstractmethod
    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's gate. Raises before anything runs."""

    # ---- installing and removing -------------------------------------------------------------------------------------------

    def install(self, guard: Guard, handle: Any) -> None:
        super().install(guard, handle)
        for name, module in self._modules.items():
            vars(module)[self.routing.attribute] = self.layer_state(name)
            module.config = self._routes[name]
        self._hooks = [
            self.model.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.model.register_forward_hook(self._leave, always_call=True),
        ]
        self.generate.install()

    def remove(self) -> None:
        for name, module in self._modules.items():
            if module.config is self._routes[name]:
                module.config = self.originals[name]
            vars(module).pop(self.routing.attribute, None)
        for installed in (*self._hooks, *self._gates, self.generate):
            installed.remove()
        self.calls = type(self.calls)()  # what was served, by all threads
        super().remove()

    def lost(self) -> str | None:
        with self.guard.lock:  # a release routes modules for a moment
            hooks = (self.model._forward_pre_hooks, self.model._forward_hooks)
            if not self.is_held or any(
                h.id not in known for h, known in zip(self._hooks, hooks, strict=True)
            ):
                return "the gate of the model was removed"
            if not self.generate.installed():
                return "generate was replaced"
            if ALL_ATTENTION_FUNCTIONS.get(self.routing.name) is not self.routing.function:
                return f"another attention function was registered as {self.routing.name!r}"
            return next((reason for name in self._modules if (reason := self._lost_layer(name))), None)

    def _lost_layer(self, name: str) -> str | None:
        module = self._modules[name]
        if module.config is not self._routes[name] or module.config._attn_implementation != self.routing.name:
            return f"the attention function of {name} was replaced"
        if self.routing.attribute not in vars(module) or self.model.get_submodule(name) is not module:
            return f"{name} was replaced"
        return None

    # ---- a forward ---------------------------------------------------------------------------------------------------------

    def begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a forward is given, by name.

        Raises:
            ProtectionLostError: it is traced, or the protection is gone. ConfigError: gradient checkpointing.
        """
        refuse_recording()
        if torch.compiler.is_compiling():
            raise ProtectionLostError(self.never_traced)
        self.calls.current = None
        self.guard.check()
        self.weights.look_if_due()
        _refuse_checkpointing(module)
        return named_arguments(inspect.signature(module.forward).bind_partial(*args, **kwargs))

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        call, self.calls.current = self.calls.current, None
        if call is not None and not call.public and output is not None:  # None: it failed
            refuse_nan(main_output(output))

    def finished(self, released: ReleasedContext) -> ReleasedContext:
        return dataclasses.replace(released, structures=tuple(map(as_rows, released.structures)))


def _refuse_checkpointing(module: Any) -> None:
    """Raises ConfigError where a forward would be run again for its gradient, when nothing says any more what it may read."""
    if not (module.training and torch.is_grad_enabled()):
        return
    if any(getattr(part, "gradient_checkpointing", False) and part.training for part in module.modules()):
        raise ConfigError(
            "Gradient checkpointing is not supported on a protected model: the backward pass would run its layers again, outside of "
            "the call that names the release. Call model.gradient_checkpointing_disable() and train with smaller batches, or train "
            "the model before it is protected."
        )
