"""Whether a release was made with --chat: its exact public rows are those of the chat template's first words, or of BOS alone."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import ConfigError, ContextError
from .models import load_tokenizer
from .public_numbers import NOTHING
from .texts import chat_head, plain_head

NOTE = "hf-dp-xattn: note: "
_NEAR = 0.05  # of a row's length: rounding of another type or device is far less, another token far more


def check_chat(handle: Any, release: Any, args: argparse.Namespace) -> None:
    """Compares --chat with what a saved release of a decoder-only model begins with; a note on stderr where that cannot be told.

    Raises:
        ConfigError: it was made the other way. What follows it would be garbage.
    """
    try:
        template = chat_head(args.model)
    except (ConfigError, ContextError):
        if args.chat:
            raise
        return  # no template, or none that a release could have been made with
    as_chat = _begins(handle, release, template)
    as_plain = _begins(handle, release, plain_head(args.model))
    if as_chat and not as_plain and not args.chat:
        raise ConfigError(
            f"This release was made with --chat: it begins with the chat template's words. Give --chat here too. {NOTHING}"
        )
    if as_plain and not as_chat and args.chat:
        raise ConfigError(
            f"This release was made without --chat: the chat template's words are not before it. Leave out --chat. {NOTHING}"
        )
    if args.chat and not as_chat:
        _note(
            "the public words before this release are not those that the chat template gives now; it may be made for other words."
        )
    elif as_chat == as_plain and not args.chat and load_tokenizer(args.model).chat_template:
        _note("the tokenizer has a chat template; if the release was made with --chat, give --chat here too.")


def _begins(handle: Any, release: Any, head: Any) -> bool:
    """Whether the release stands behind these PUBLIC ids [h]: by how many rows it has before it, and by what they are."""
    kept = [c.public_rows for c in release.contexts]
    if any(len(rows) != len(head) for rows in kept):
        return False
    if not len(head):
        return True
    own = handle.host.encoder.run(head).float().cpu()
    lengths = own.norm(dim=1)
    return all(bool(((rows.float().cpu() - own).norm(dim=1) <= _NEAR * lengths).all()) for rows in kept)


def _note(what: str) -> None:
    print(f"{NOTE}{what}", file=sys.stderr)
