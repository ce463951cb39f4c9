"""Copies of a protected UNet that a host makes of its parts (`UNetMotionModel.from_unet2d`, `ControlNetModel.from_unet`) are refused.

Such a model has the layers that read the prompt without their protection, and no gate. What is copied whole (`state_dict` of the UNet, as
saving and averaging of weights do) is the caller's own doing; no prompt gets there while the text encoder is closed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import DPXAttnError, ProtectionLostError
from ..access import NO_COPY
from ..accounts import PROTECT_AGAIN

PARTIAL = (
    "A part of a protected UNet ({name}) is being copied: the copy (AnimateDiff's motion UNet, a ControlNet made from the UNet, ...) would "
    "read prompts without protection. Nothing was copied. Make it before dpx.protect, or from another UNet with the same weights; or call "
    f"dpx.unprotect(pipe) first, and {PROTECT_AGAIN}."
)


class CopyGuard:
    """Hooks on the protected layers that refuse `state_dict` of a part of the UNet."""

    def __init__(self, layers: dict[str, Any]) -> None:
        self._hooks = [layer.register_state_dict_pre_hook(_Refusal(name)) for name, layer in layers.items()]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _Refusal:
    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not prefix.endswith(
            f"{self._name}."
        ):  # from the UNet itself, or from what holds it, the whole name is asked for
            raise ProtectionLostError(PARTIAL.format(name=self._name))

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError(NO_COPY)
