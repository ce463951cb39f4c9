"""What `calibrate` refuses before anything is encoded or trained."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch

from ..calibration.calibration_options import CalibrationOptions
from ..calibration.kinds import kind_for
from ..errors import ConfigError
from ..mechanisms.anchors.plan import RELEASES

# the least that each option may be; those that may be None have a default elsewhere
_LEAST = {
    "anchors": 2,
    "steps": 1,
    "memory_mb": 1,
    "rank": 0,
    "query_prompts": 1,
    "query_steps": 1,
    "queries_per_step": 1,
    "seed": 0,
    "replies": 0,
    "prefix_bucket": 1,
}
_MAY_BE_NONE = frozenset({"anchors", "steps", "query_prompts", "query_steps", "prefix_bucket"})


def check_options(options: CalibrationOptions) -> None:
    """Refuses numbers and names that no calibration can be made with.

    Args:
        options: what `calibrate` was asked for.

    Raises:
        ConfigError: a number is none, or too small; an unknown release.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is None and name in _MAY_BE_NONE:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
    unknown = [r for r in options.releases if r not in RELEASES]
    if unknown or not options.releases:
        raise ConfigError(
            f"releases must name some of {', '.join(RELEASES)}, got {', '.join(map(repr, options.releases)) or 'none'}."
        )


def check_contexts(public: Any, mechanism: str) -> None:
    """Refuses public contexts that are too few, or that nothing can be made of.

    Args:
        public: as `calibrate` was given them, not an iterator.
        mechanism: to calibrate for.

    Raises:
        ConfigError: too few; no contexts; NaN or Inf.
    """
    parts = list(public.values()) if isinstance(public, Mapping) else [public]
    if isinstance(public, (str, bytes)) or not parts or not all(isinstance(p, Sized) for p in parts):
        raise ConfigError(
            f"public_contexts must be a list of contexts or a tensor of them, got {type(public).__name__}."
        )
    if any(isinstance(p, torch.Tensor) and not p.ndim for p in parts):
        raise ConfigError("public_contexts must be a batch, got a tensor of no dimension.")
    count, least = len(parts[0]), kind_for(mechanism).fewest
    if count < least:
        raise ConfigError(
            f"A calibration of {mechanism} needs at least {least} public contexts, got {count}; thousands do better."
        )
    for part in parts:
        if isinstance(part, torch.Tensor):
            if part.is_floating_point() and not bool(torch.isfinite(part).all()):
                raise ConfigError("public_contexts hold NaN or Inf.")
        else:
            wrong = next((c for c in part if not isinstance(c, Sized)), part)
            if wrong is not part:
                raise ConfigError(f"public_contexts hold a {type(wrong).__name__}, which is no context.")


def check_width(rows: torch.Tensor, channels: int) -> None:
    """Refuses public rows [..., C] of another width than the host reads.

    Args:
        rows: of its context space.
        channels: that it reads.

    Raises:
        ConfigError: of another width.
    """
    if rows.shape[-1] != channels:
        raise ConfigError(f"Public rows have {rows.shape[-1]} channels, and this model reads {channels}.")
