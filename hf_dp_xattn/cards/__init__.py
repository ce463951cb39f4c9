"""Cards: the README.md of what is saved or pushed, with the guarantee word for word."""

from __future__ import annotations

from .artefacts import calibration_card, config_card, protection_card, release_card

__all__ = [
    "calibration_card",
    "config_card",
    "protection_card",
    "release_card",
]
