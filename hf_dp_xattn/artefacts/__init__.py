"""Saving and loading: strict JSON files, and the way to a Hub repository and back. No pickle anywhere.

`codec.py` adds tensors, and is imported by itself: a config needs no torch.
"""

from __future__ import annotations

from .card import CardOptions, card_file, card_options
from .documents import dump_document, read_document, write_files
from .shareable import Shareable
from .transfer import Found, HubOptions, PushOptions, download_folder, locate

__all__ = [
    "CardOptions",
    "Found",
    "HubOptions",
    "PushOptions",
    "Shareable",
    "card_file",
    "card_options",
    "download_folder",
    "dump_document",
    "locate",
    "read_document",
    "write_files",
]
