"""A prompt as separately encoded phrases: with unit="group", "replace one phrase" is then a real guarantee, end to end.

A text encoder mixes the rows of one text, so a guarantee for rows says nothing about words. Phrases that are encoded apart do not mix.
*Public*: where a prompt is split, how many phrases there are, and their order. *Not covered*: that certain phrases occur together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from ...errors import ContextError
from ...records import plain_text
from .text_side import TextSide

MAX_PHRASES = 64
RULE = "at commas, semicolons, line breaks and the word 'and', but not within 1,000 or black-and-white"
_SPLIT = re.compile(r"(?<!\d),|,(?!\d)|[;\n]|(?<![^\s,;])and(?![^\s,;])", re.IGNORECASE)


def split_phrases(text: str) -> list[str]:
    """The phrases of a prompt: split at commas, semicolons, line feeds and the word "and"; stripped; empty ones are left out. A comma
    between two digits splits nothing, nor does an "and" within a compound.

    The rule is public, and so is where it splits a prompt: the number of phrases is not protected.

    Args:
        text: a prompt.

    Example:
        >>> dpx.split_phrases("a red circle, 1,000 black-and-white cats and a dog")
        ['a red circle', '1,000 black-and-white cats', 'a dog']
    """
    return [phrase for phrase in (part.strip() for part in _SPLIT.split(plain_text(text))) if phrase]


def check_phrases(phrases: Sequence[object]) -> list[str]:
    """The phrases of one context, stripped.

    Raises:
        ContextError: none, too many, an empty one, or something else than a string. The message quotes nothing.
    """
    if not 0 < len(phrases) <= MAX_PHRASES:
        raise ContextError(
            f"A context has 1 to {MAX_PHRASES} phrases, this one has {len(phrases)}; nothing was spent."
        )
    texts = [plain_text(p).strip() for p in phrases if isinstance(p, str)]
    if len(texts) != len(phrases) or not all(texts):
        raise ContextError("A phrase is empty or not a string; nothing was spent.")
    return texts


def encode_tokens(text: TextSide, tokens: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """The private rows [r, C] of each phrase (ids, mask), encoded by itself; all have the same number of rows."""
    return [text.encode(ids, mask)[int(text.first_row_is_public) :] for ids, mask in tokens]
