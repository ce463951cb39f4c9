"""Public arguments of a pipeline's call at which diffusers would stumble after the first step: checked before a charge."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import ConfigError
from ..placeholder import holds_placeholder

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TENSORS = ("latents", "image", "mask_image", "masked_image_latents", "negative_prompt_embeds")


def check_arguments(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Of a call of a protected pipeline, by name.

    Raises:
        ConfigError: a callback that cannot be called with what diffusers passes it, steps that are no integer, a tensor that holds NaN or
            Inf, GLIGEN, a scheduler whose step takes something else, or no VAE of the UNet's dtype for a picture. Nothing was spent.
    """
    check_callbacks({**arguments, **arguments.get("kwargs", {})})
    steps = arguments.get("num_inference_steps")
    if isinstance(steps, float):
        raise ConfigError("`num_inference_steps` must be an integer, got float. Nothing was spent.")
    for name in TENSORS:
        value = arguments.get(name)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, torch.Tensor) or (name == TENSORS[-1] and holds_placeholder(tensor)):
                continue  # a release of a private negative text
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"`{name}` holds NaN or Inf. Nothing was spent.")
    attention = arguments.get("cross_attention_kwargs")
    if isinstance(attention, Mapping) and attention.get("gligen") is not None:
        raise ConfigError("GLIGEN is not supported on a protected pipeline. Nothing was spent.")
    if not _steps_as_known(pipe.scheduler):
        raise ConfigError(
            f"{type(pipe.scheduler).__name__} takes other arguments in a step than (model_output, timestep, sample), which this pipeline "
            "gives it: choose another scheduler. Nothing was spent."
        )
    if arguments.get("output_type") == "latent":
        return
    if pipe.vae is None:
        raise ConfigError(
            'This pipeline has no VAE to draw a picture with: pass output_type="latent". Nothing was spent.'
        )

    have, need = getattr(pipe.vae, "dtype", None), pipe.unet.dtype
    if have != need and _decodes_as_it_is(pipe.vae, have):
        raise ConfigError(
            f"The VAE is {have} and the UNet is {need}, so that it cannot draw what the UNet makes: cast one (pipe.vae.to({need})), or "
            'pass output_type="latent". Nothing was spent.'
        )


def check_callbacks(arguments: Mapping[str, Any]) -> None:
    """Of a call, with those that it takes as `**kwargs`. Raises ConfigError for one that cannot be called with what diffusers passes it."""
    callback, deprecated = arguments.get("callback_on_step_end"), arguments.get("callback")
    if callback is not None and not _takes(callback, None, 0, 0, {}):
        raise ConfigError(
            "`callback_on_step_end` must be a function of (pipe, step, timestep, callback_kwargs). Nothing was spent."
        )
    if deprecated is not None and not _takes(deprecated, 0, 0, None):
        raise ConfigError("`callback` must be a function of (step, timestep, latents). Nothing was spent.")


def _decodes_as_it_is(vae: Any, dtype: Any) -> bool:
    """Whether nothing casts for it: neither autocast, nor hooks of diffusers, nor code of the user's own."""
    plain = type(vae).__module__.startswith("diffusers.") and "decode" not in vars(vae)
    hooked = any(hasattr(part, "_diffusers_hook") for part in vae.modules()) if plain else True
    return plain and not hooked and dtype in _PLAIN and not torch.is_autocast_enabled(vae.device.type)


def _steps_as_known(scheduler: Any) -> bool:
    """Whether its step can be called as Stable Diffusion's pipelines call it; taken on trust where its signature cannot be read."""
    step = getattr(scheduler, "step", None)
    if not callable(step):
        return False
    try:
        inspect.signature(step).bind(None, None, None, return_dict=False)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _takes(callback: Any, *arguments: object) -> bool:
    """Whether it can be called with so many arguments; taken on trust where its signature cannot be read."""
    if not callable(callback):
        return False
    try:
        inspect.signature(callback).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
