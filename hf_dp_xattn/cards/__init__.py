"""Cards: the README.md of what is saved or pushed, with the guarantee word for word."""

from __future__ import annotations

from .artefacts import calibration_card, config_card, protection_card, release_card
from .rendering import CardOptions, card_file, card_options

__all__ = [
    "CardOptions",
    "calibration_card",
    "card_file",
    "card_options",
    "config_card",
    "protection_card",
    "release_card",
]
