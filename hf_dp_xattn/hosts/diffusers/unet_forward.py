"""The gate of a protected UNet: before each forward it decides what the layers may read, behind it it looks for NaN."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from ...errors import ProtectionLostError
from ..accounts import PROTECT_AGAIN
from ..bindings import unique
from ..guard import Guard
from ..nan import main_output, refuse_nan
from ..placeholder import Tag, read_tags, rewritten
from ..recorded_runs import refuse_recording
from ..tables import LayerTable
from ..weight_changes import refuse_call_adapters
from ..weights import Weights
from .forward_inputs import check_forward, read_states, refuse_beside, refuse_checkpointing
from .processor import Forward, Forwards, Layout

REMOVED = (
    "The protection is no longer in place: the gate of the UNet was removed. Call dpx.unprotect(pipe) and "
    f"{PROTECT_AGAIN}."
)


class ServesUNet(Protocol):
    """What the gate of a UNet asks of its host. layers: the protected ones, by name. weights: that a release must fit."""

    guard: Guard
    weights: Weights

    @property
    def model(self) -> Any: ...
    @property
    def layers(self) -> Mapping[str, Any]: ...
    def activate(self, tags: Sequence[Tag], device: torch.device | str) -> dict[str, LayerTable]: ...
    def hand_out(self, tables: dict[str, LayerTable]) -> None: ...


class ForwardGate:
    """Hooks around the UNet's forward. What they decide is held by thread: nothing of it is seen by another call."""

    def __init__(self, host: ServesUNet) -> None:
        self._unet, self._host = host.model, host
        self.forwards = Forwards()
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self._unet.register_forward_pre_hook(self._before, with_kwargs=True),
            self._unet.register_forward_hook(self._behind, always_call=True),
        ]

    def installed(self) -> bool:
        known = (self._unet._forward_pre_hooks, self._unet._forward_hooks)
        return bool(self._hooks) and all(h.id in k for h, k in zip(self._hooks, known, strict=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def inside_pipeline(self) -> Iterator[None]:
        """A pipeline's call, which looks for NaN once, at its end."""
        self.forwards.pipelines += 1
        try:
            yield
        finally:
            self.forwards.pipelines -= 1

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        refuse_recording()
        # A trace cannot read markers; there, what is not proven fit becomes NaN in the processors.
        if not torch.compiler.is_compiling():
            self.forwards.current = self.forwards.rewritten = None
            self.forwards.current = self.read(args, kwargs)

    def _behind(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        forward, self.forwards.current = self.forwards.current, None
        altered, self.forwards.rewritten = self.forwards.rewritten, None
        if output is None:  # it failed
            return
        if forward is None:
            raise ProtectionLostError(REMOVED)
        if altered is not None:
            main_output(output).masked_fill_(altered, torch.nan)
        if forward.layout is not None and not self.forwards.pipelines:  # a pipeline looks once, at its end
            refuse_nan(main_output(output))

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        """What the layers may read; compiled ones of this thread find it as well. Raises before anything runs, and before a release that is
        due is charged."""
        host, guard = self._host, self._host.guard
        guard.check()
        host.weights.look_if_due()
        refuse_checkpointing(self._unet)
        states = read_states(args, kwargs)
        seen = self.forwards.seen
        known = seen is not None and seen[0]() is states and seen[1] == self._state_of(states)
        if seen is not None and known and not self._rewritten(states, seen[2]):
            refuse_call_adapters(host.weights.roots())
            host.hand_out(seen[3].tables)
            return seen[3]  # the same tensor at every step: parsed already
        batch_tags = read_tags(states)
        tags = unique(batch_tags)
        if not tags:
            if not guard.access.public:
                raise ProtectionLostError(
                    "This UNet is protected and was called with embeddings of which none is a placeholder. Pass release.inputs(), or "
                    "declare the text public with `with protected.public():`."
                )
            return Forward(dict.fromkeys(host.layers, LayerTable()))
        refuse_call_adapters(host.weights.roots())
        refuse_beside(kwargs)
        if guard.promises.due(tags):
            check_forward(self._unet, args, kwargs, states)
            guard.promises.keep(tags)
        tables = host.activate(tags, states.device)
        forward = Forward(tables, Layout.of(states, batch_tags, tags))
        if not states.is_inference():
            self.forwards.seen = weakref.ref(states), self._state_of(states), states.detach().clone(), forward
        return forward

    def _rewritten(self, states: torch.Tensor, kept: torch.Tensor) -> bool:
        """Whether it was written to past its version. A pipeline's steps do not wait for the device: there the output is NaN."""
        altered = rewritten(states, kept)
        if not self._may_wait(states):
            self.forwards.rewritten = altered
            return False
        return bool(altered)

    def _may_wait(self, states: torch.Tensor) -> bool:
        return states.device.type == "cpu" or not self.forwards.pipelines

    def _state_of(self, states: torch.Tensor) -> object:
        return states._version, self._host.weights.state()
