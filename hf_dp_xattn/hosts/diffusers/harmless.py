"""Calls that change nothing of what a protected layer computes must not take its processor away.

diffusers resets every attention layer when slicing or xformers is switched on or off, or an IP-Adapter unloaded, whether or not there was
any. A protected layer has its own way to attend, which these settings are not for: they wait until `unprotect`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .processor import DPAttnProcessor


class HarmlessCalls:
    """Shadows methods of the UNet and of its protected layers, by instance attributes; what changes something goes through."""

    def __init__(self, unet: Any, processors: dict[Any, DPAttnProcessor]) -> None:
        """processors: of each protected layer."""
        self._unet, self._processors = unet, processors
        self._shadows: list[tuple[Any, str, Callable[..., Any]]] = []
        self._waiting: dict[Any, Callable[[], Any]] = {}  # of each layer, what its processor will be told

    def install(self) -> None:
        self._shadow(self._unet, "set_default_attn_processor", self._set_default)
        for layer, processor in self._processors.items():
            # unload_ip_adapter makes all processors anew by their classes
            self._skip(layer, processor, "set_processor", _is_blank)
            self._skip(layer, processor, "set_attention_slice")
            self._skip(layer, processor, "set_use_memory_efficient_attention_xformers")

    def remove(self) -> None:
        """When the layers have their own processors again, which are then told what was asked meanwhile."""
        for target, name, shadow in self._shadows:
            if vars(target).get(name) is shadow:
                del vars(target)[name]
        for request in self._waiting.values():
            request()
        self._shadows, self._waiting = [], {}

    def _shadow(self, target: Any, name: str, shadow: Callable[..., Any]) -> None:
        if hasattr(target, name):
            vars(target)[name] = shadow
            self._shadows.append((target, name, shadow))

    def _skip(
        self, layer: Any, ours: DPAttnProcessor, name: str, asks_nothing: Callable[[Any], bool] | None = None
    ) -> None:
        """asks_nothing: of the first argument; None: the call waits, whatever it asks."""
        original = getattr(layer, name, None)

        def shadow(*args: Any, **kwargs: Any) -> Any:
            assert original is not None
            arguments = (*args, *kwargs.values())
            if layer.processor is ours and arguments and (asks_nothing is None or asks_nothing(arguments[0])):
                if asks_nothing is None:
                    self._waiting[layer] = functools.partial(original, *args, **kwargs)
                return None
            return original(*args, **kwargs)

        self._shadow(layer, name, shadow)

    def _set_default(self) -> None:
        """The default of all other layers; a protected layer's own processor is its default."""
        from diffusers.models.attention_processor import AttnProcessor

        current = self._unet.attn_processors
        protected = any(isinstance(p, DPAttnProcessor) for p in current.values())
        if not protected:
            return type(self._unet).set_default_attn_processor(self._unet)
        self._unet.set_attn_processor(
            {n: p if isinstance(p, DPAttnProcessor) else AttnProcessor() for n, p in current.items()}
        )


def _is_blank(processor: Any) -> bool:
    return isinstance(processor, DPAttnProcessor) and processor.table is None
