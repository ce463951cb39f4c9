"""Placeholders: what travels through a host in place of a private context.

A placeholder has the shape and dtype of prompt embeddings and no private content: NaN everywhere, but for the first channels of
row 0, which hold a magic number, a random tag and what its shape was. The tag names a *binding* (a release, and perhaps public rows beside
it). Only a whole one is read as one: rows that were joined to it, cut off or changed would have no effect, and are refused.
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
SIZE_DIGITS = 2
CODE_CHANNELS = len(MAGIC) + TAG_DIGITS + SIZE_DIGITS
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
NOT_WHOLE = (
    "These embeddings hold a placeholder that is not whole: rows were joined to it or cut off, or it was weighted, averaged or masked. "
    "Nothing of that would have an effect: pass release.inputs() on as it is; public words go to release.inputs(...)."
)
NAN_ROWS = (
    "These embeddings hold rows of NaN: of a text encoder that overflows, as float16 does (run it in bfloat16 or float32), or of a "
    "placeholder that is not whole (cut off, weighted or averaged; pass release.inputs() on as it is). Nothing was run."
)

Tag = tuple[int, ...]


def new_tag() -> Tag:
    """A fresh random tag: nothing about the context, and not guessable, so that a stale placeholder names nothing."""
    return tuple(secrets.randbelow(128) for _ in range(TAG_DIGITS))


def _size(rows: int, channels: int) -> tuple[int, ...]:
    """Digits that tell a placeholder's shape from any other one with as many rows or as many channels."""
    number = rows * 4099 + channels
    return tuple(number // 128**i % 128 for i in range(SIZE_DIGITS))


def make_placeholder(
    tags: Sequence[Tag], rows: int, channels: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """[len(tags), rows, channels]; `channels` must be at least CODE_CHANNELS."""
    result = torch.full((len(tags), rows, channels), torch.nan, dtype=dtype, device=device)
    size = _size(rows, channels)
    code = torch.tensor([MAGIC + tuple(tag) + size for tag in tags], dtype=dtype, device=device)
    result[:, 0, :CODE_CHANNELS] = code
    return result


def is_marked(states: torch.Tensor) -> torch.Tensor:
    """[B, n, C] -> bool [B]: which batch elements are whole placeholders. Tensor operations only."""
    batch, rows, channels = states.shape
    if rows == 0 or channels < CODE_CHANNELS:
        return torch.zeros(batch, dtype=torch.bool, device=states.device)
    start = len(MAGIC) + TAG_DIGITS
    # built from Python lists so that torch.compile folds them into the graph
    magic = torch.tensor(MAGIC, dtype=states.dtype, device=states.device)
    size = torch.tensor(_size(rows, channels), dtype=states.dtype, device=states.device)
    code = (states[:, 0, : len(MAGIC)] == magic).all(dim=-1)
    code = code & (states[:, 0, start:CODE_CHANNELS] == size).all(dim=-1)
    return code & (states.isnan().sum(dim=(1, 2)) == rows * channels - CODE_CHANNELS)


def _pieces(states: torch.Tensor) -> torch.Tensor:
    """[..., n, C] -> bool [...]: whether a row begins with the numbers of a placeholder, all CODE_CHANNELS of them."""
    magic = torch.tensor(MAGIC, dtype=states.dtype, device=states.device)
    digits = states[..., len(MAGIC) : CODE_CHANNELS]
    are_digits = ((digits >= 0) & (digits < 128) & (digits == digits.floor())).all(-1)
    return ((states[..., : len(MAGIC)] == magic).all(-1) & are_digits).any(-1)


def holds_placeholder(states: torch.Tensor) -> bool:
    """Whether [..., n, C] holds a placeholder, whole or not, and so is no context."""
    return states.ndim > 1 and states.shape[-1] >= CODE_CHANNELS and bool(_pieces(states).any())


@torch.no_grad()
def rewritten(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """bool []: whether states differ from their copy by any bit. A write to `.data` (or through numpy) shows in nothing else."""
    if (states.shape, states.dtype, states.device) != (kept.shape, kept.dtype, kept.device):
        return torch.ones((), dtype=torch.bool, device=states.device)
    bits = _BITS[states.element_size()]
    return (states.detach().view(bits) != kept.view(bits)).any()


def match_tags(states: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
    """[B, n, C], [A, TAG_DIGITS] -> bool [B, A]: which binding each batch element names. Tensor operations only."""
    digits = states[:, 0, len(MAGIC) : len(MAGIC) + TAG_DIGITS].to(torch.float32)
    return (digits.unsqueeze(1) == tags.unsqueeze(0)).all(dim=-1)


def read_tags(states: torch.Tensor) -> list[Tag | None]:
    """The tag of each batch element of [B, n, C], or None where there is no placeholder. Waits for the device.

    Raises:
        ReleaseError: a placeholder that is not whole, a piece of one, or rows of NaN.
    """
    if states.ndim != 3 or states.shape[1] == 0 or states.shape[2] < len(MAGIC):
        return [None] * (states.shape[0] if states.ndim else 0)
    states = states.detach()
    code = states[:, 0, len(MAGIC) : len(MAGIC) + TAG_DIGITS].to("cpu", torch.float32).tolist()
    marks, empty = _pieces(states), states.isnan().all(-1).any(-1)
    flags = torch.stack([is_marked(states), marks, empty], dim=-1).tolist()
    result: list[Tag | None] = []
    for digits, (whole, marked, nan) in zip(code, flags, strict=True):
        if not whole:
            if marked or nan:
                raise ReleaseError(NOT_WHOLE if marked else NAN_ROWS)
            result.append(None)
            continue
        if not all(d == d and d == int(d) and 0 <= d < 128 for d in digits):
            raise ReleaseError(NOT_WHOLE)
        result.append(tuple(int(d) for d in digits))
    return result
