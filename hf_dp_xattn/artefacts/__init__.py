"""Saving and loading: strict JSON files, and the way to a Hub repository and back. No pickle anywhere."""

from __future__ import annotations

from .card import CardOptions, card_file, card_options
from .documents import dump_document, read_document, seal, unseal, write_files
from .transfer import (
    Found,
    HubOptions,
    PushOptions,
    download_folder,
    find_files,
    locate,
    push_files,
    push_with_card,
)

__all__ = [
    "CardOptions",
    "Found",
    "HubOptions",
    "PushOptions",
    "card_file",
    "card_options",
    "download_folder",
    "dump_document",
    "find_files",
    "locate",
    "push_files",
    "push_with_card",
    "read_document",
    "seal",
    "unseal",
    "write_files",
]
