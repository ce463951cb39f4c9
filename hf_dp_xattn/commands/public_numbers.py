"""Public numbers of the command line, checked before anything is loaded or spent: libraries would refuse them after the charge."""

from __future__ import annotations

import argparse
import math

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


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
