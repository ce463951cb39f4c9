"""Cards: the README.md of what is saved or pushed, with the guarantee word for word."""

from __future__ import annotations

from .artefacts import config_card, protection_card, release_card

__all__ = [
    "config_card",
    "protection_card",
    "release_card",
]
