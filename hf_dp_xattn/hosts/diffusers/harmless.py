"""Calls that ask for what is in place already must not take a protected layer's processor away.

diffusers resets every attention layer when slicing or xformers is switched off, or an IP-Adapter unloaded, whether or not there was any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .processor import DPAttnProcessor


class HarmlessCalls:
    """Shadows methods of the UNet and of its protected layers, by instance attributes; what changes something goes through."""

    def __init__(self, unet: Any, processors: dict[Any, DPAttnProcessor]) -> None:
        """processors: of each protected layer."""
        self._unet, self._processors = unet, processors
        self._shadows: list[tuple[Any, str, Callable[..., Any]]] = []

    def install(self) -> None:
        self._shadow(self._unet, "set_default_attn_processor", self._set_default)
        for layer, own in self._processors.items():
            # unload_ip_adapter makes all processors anew by their classes
            self._skip(layer, own, "set_processor", lambda p, *a, **k: _is_blank(p))
            self._skip(layer, own, "set_attention_slice", lambda size, *a, **k: size is None)
            self._skip(layer, own, "set_use_memory_efficient_attention_xformers", lambda on, *a, **k: not on)

    def remove(self) -> None:
        for target, name, shadow in self._shadows:
            if vars(target).get(name) is shadow:
                del vars(target)[name]
        self._shadows = []

    def _shadow(self, target: Any, name: str, shadow: Callable[..., Any]) -> None:
        if hasattr(target, name):
            vars(target)[name] = shadow
            self._shadows.append((target, name, shadow))

    def _skip(self, layer: Any, own: DPAttnProcessor, name: str, asks_nothing: Callable[..., bool]) -> None:
        original = getattr(layer, name, None)

        def shadow(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if layer.processor is own and given and asks_nothing(*given):
                return None
            assert original is not None
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
