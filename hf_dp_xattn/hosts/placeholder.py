"""Placeholders: what travels through a host in place of a private context.

A placeholder has the shape and dtype of prompt embeddings and no private content: NaN everywhere, but for the first channels of
row 0, which hold a magic number and a random tag. The tag names a *binding* (a release, and perhaps public rows beside it).
A layer that lost its processor multiplies NaN: it cannot leak. Concatenation, `repeat`, `view` and casts keep the marker:
its digits are integers below 128, exact in bfloat16 and float16.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from ..errors import ReleaseError

MAGIC = (68, 80, 88, 65)
TAG_DIGITS = 9  # 63 random bits
CODE_CHANNELS = len(MAGIC) + TAG_DIGITS

Tag = tuple[int, ...]


def new_tag() -> Tag:
    """A fresh random tag: nothing about the context, and not guessable, so that a stale placeholder names nothing."""
    return tuple(secrets.randbelow(128) for _ in range(TAG_DIGITS))


def make_placeholder(
    tags: Sequence[Tag], rows: int, channels: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """[len(tags), rows, channels]; `channels` must be at least CODE_CHANNELS."""
    result = torch.full((len(tags), rows, channels), torch.nan, dtype=dtype, device=device)
    code = torch.tensor([MAGIC + tuple(tag) for tag in tags], dtype=dtype, device=device)
    result[:, 0, :CODE_CHANNELS] = code
    return result


def is_marked(states: torch.Tensor) -> torch.Tensor:
    """[B, n, C] -> bool [B]: which batch elements carry the magic number. Tensor operations only."""
    head = states[:, 0, : len(MAGIC)]
    # built from a Python list so that torch.compile folds it into the graph
    magic = torch.tensor(MAGIC, dtype=states.dtype, device=states.device)
    return (head == magic).all(dim=-1)


def match_tags(states: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """[B, n, C], [A, TAG_DIGITS] -> bool [B, A]: which binding each batch element names. Tensor operations only."""
    digits = states[:, 0, len(MAGIC) : CODE_CHANNELS].to(torch.float32)
    return (digits.unsqueeze(1) == tags.unsqueeze(0)).all(dim=-1)


def read_tags(states: torch.Tensor) -> list[Tag | None]:
    """The tag of each batch element of [B, n, C], or None where there is no placeholder. Waits for the device.

    Raises:
        ReleaseError: the magic number is there but the tag is not one (the placeholder was scaled or mixed).
    """
    if states.ndim != 3 or states.shape[1] == 0 or states.shape[2] < CODE_CHANNELS:
        return [None] * (states.shape[0] if states.ndim else 0)
    result: list[Tag | None] = []
    for row in states.detach()[:, 0, :CODE_CHANNELS].to("cpu", torch.float32).tolist():
        if tuple(row[: len(MAGIC)]) != MAGIC:
            result.append(None)
            continue
        digits = row[len(MAGIC) :]
        if not all(d == d and d == int(d) and 0 <= d < 128 for d in digits):
            raise ReleaseError(
                "A placeholder was changed on its way (weighted, averaged or masked). Pass release.inputs() on as it is."
            )
        result.append(tuple(int(d) for d in digits))
    return result
