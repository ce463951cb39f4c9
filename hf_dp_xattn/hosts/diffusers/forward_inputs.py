"""What a protected UNet is called with: checked before anything is spent or computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConfigError, ProtectionLostError

NO_SCALE = (
    "A LoRA scale per call (cross_attention_kwargs={'scale': ...}) would change the layers after the release. Set it before, with "
    "pipe.set_adapters(name, weight) or pipe.fuse_lora(lora_scale=...)."
)
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def read_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """`encoder_hidden_states` of a call. Raises ProtectionLostError unless they are one tensor."""
    states = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
    if not isinstance(states, torch.Tensor):
        raise ProtectionLostError(
            "A protected UNet takes encoder_hidden_states as one tensor (no image prompts beside it)."
        )
    return states


def refuse_beside(kwargs: Mapping[str, Any]) -> None:
    """What cannot stand beside a placeholder.

    Raises:
        ConfigError: a mask, further conditions, a LoRA scale. ProtectionLostError: residuals of a ControlNet that read the placeholder.
    """
    for name in ("encoder_attention_mask", "added_cond_kwargs"):
        if kwargs.get(name) is not None:
            raise ConfigError(f"A private context cannot be combined with {name}; pass None.")
    attention = kwargs.get("cross_attention_kwargs")
    if attention is not None and not isinstance(attention, Mapping):
        raise ConfigError(f"cross_attention_kwargs must be a mapping, got {type(attention).__name__}.")
    if (attention or {}).get("scale", 1.0) != 1.0:
        raise ConfigError(NO_SCALE)
    for name in RESIDUALS:
        value = kwargs.get(name)
        tensors = [value] if isinstance(value, torch.Tensor) else list(value or ())
        if any(bool(t.isnan().any()) for t in tensors):
            raise ProtectionLostError(
                f"{name} holds NaN: another model (a ControlNet) read the placeholder of a release, which holds no text. Give that "
                "model a public text, and pass its residuals to the protected UNet. Nothing was run."
            )


def refuse_checkpointing(unet: torch.nn.Module) -> None:
    """Raises ConfigError where a forward would be run again for its gradient, when nothing says any more what it may read."""
    if torch.is_grad_enabled() and any(
        getattr(part, "gradient_checkpointing", False) for part in unet.modules()
    ):
        raise ConfigError(
            "Gradient checkpointing is not supported on a protected UNet: the backward pass would run its layers again, outside of the "
            "call that names the release. Call unet.disable_gradient_checkpointing() and train with smaller batches, or train the UNet "
            "before it is protected."
        )


def check_forward(unet: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], states: torch.Tensor) -> None:
    """Whether the UNet can be run with these public inputs; asked before a release is charged for the call.

    Raises:
        ConfigError: the noised sample does not fit the UNet or the prompts.
    """
    sample = kwargs.get("sample", args[0] if args else None)
    channels = unet.config.in_channels
    if not isinstance(sample, torch.Tensor) or sample.ndim != 4 or 0 in sample.shape:
        shape = list(sample.shape) if isinstance(sample, torch.Tensor) else type(sample).__name__
        raise ConfigError(f"The UNet takes a sample [B, {channels}, h, w], got {shape}. Nothing was spent.")
    if sample.shape[:2] != (len(states), channels):
        raise ConfigError(
            f"The UNet takes a sample [{len(states)}, {channels}, h, w] for these prompts, got {list(sample.shape)} (check latents, "
            "image, mask_image, num_images_per_prompt). Nothing was spent."
        )
    autocast = torch.is_autocast_enabled(sample.device.type)
    if not sample.is_floating_point() or (sample.dtype != unet.dtype and not autocast):
        raise ConfigError(
            f"The UNet computes in {unet.dtype}, its sample is {sample.dtype}. Nothing was spent."
        )
