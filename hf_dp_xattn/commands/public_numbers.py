"""Public numbers of the command line, checked before anything is loaded or spent: libraries would refuse them after the charge."""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any

from ..errors import ConfigError

NOTHING = "Nothing was spent."
LARGEST_SEED = 2**63 - 1  # of torch
_MOST = 10**6
_RANGES = {
    "steps": (1, _MOST),
    "height": (1, _MOST),
    "width": (1, _MOST),
    "pixels": (1, _MOST),
    "new_tokens": (1, _MOST),
    "anchors": (1, _MOST),
    "length": (1, _MOST),
    "seed": (0, LARGEST_SEED),
}
_EIGHT = 8  # diffusers takes multiples of it only, whatever the VAE's factor is


def check_numbers(args: argparse.Namespace) -> None:
    """Raises ConfigError for a number that no model takes; options that were not given, or that the command lacks, are skipped."""
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            most = "2^63 - 1" if high == LARGEST_SEED else f"{high:,}"
            raise ConfigError(f"{_option(name)} must be an integer from {low} to {most}. {NOTHING}")
    guidance = getattr(args, "guidance", None)
    if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
        raise ConfigError(f"--guidance must be a finite number that is not negative. {NOTHING}")


def check_pictures(pipe: Any, args: argparse.Namespace) -> None:
    """What this pipeline can draw.

    Raises:
        ConfigError: it starts from an image; a size that is no multiple of its VAE's factor, or more steps than its scheduler has.
    """
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        raise ConfigError(
            f"{type(pipe).__name__} starts from an image, which the command line does not read: hf-dp-xattn release, and then in Python "
            f"pipe(**release.inputs(), image=...). {NOTHING}"
        )
    factor = math.lcm(_EIGHT, int(pipe.vae_scale_factor))
    for name in ("height", "width", "pixels"):
        value = getattr(args, name, None)
        if value is not None and value % factor:
            raise ConfigError(
                f"{_option(name)} must be a multiple of {factor} for this pipeline, got {value}. {NOTHING}"
            )
    if args.steps is not None:
        try:
            scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
            scheduler.set_timesteps(args.steps)
        except Exception as error:  # each scheduler has bounds of its own
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"--steps {args.steps} does not suit this pipeline's {type(pipe.scheduler).__name__} ({type(error).__name__}: {reason}). "
                f"{NOTHING}"
            ) from None


def check_decoder_room(model: Any, tokens: int) -> None:
    """Raises ConfigError where an encoder-decoder model's decoder has fewer positions than `tokens`, of its start and its text."""
    from torch import nn

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            places = module.num_embeddings - int(getattr(module, "offset", 0))
            if tokens > places:
                raise ConfigError(
                    f"The decoder has {places} positions, and --begin and --new-tokens need {tokens}: ask for fewer. {NOTHING}"
                )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
