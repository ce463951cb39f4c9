"""`PrivateEncoding`: a weighted private text in the caller's hands, which nothing but a release can read.

It is encoded when its release is charged, not before: there is no tensor that could be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch

from ..errors import ConfigError, ContextError
from .context import Part, PrivateContext, Rows, plain_bytes

PRIVATE = "A private encoding is read by its release only: protected.release(encoding). Nothing was spent."
PARTS = (
    'Weighted text is a list of texts and (text, weight): ["a", ("red", 1.3), "car"]; a weight is a number of at most 1,000,000. '
    "Nothing was spent."
)

LARGEST = 1e6  # beyond it half precision overflows, and no weighting means anything


class _Unreadable(ContextError, AttributeError):
    """So that `hasattr` says no."""


class PrivateEncoding:
    """What `protected.private_encode` gives: takes no part in arithmetic, has no attributes, is not copied, pickled or shown.

    Example:
        >>> protected = dpx.protect(pipe, kernel_sum, calibration=calibration)  # doctest: +SKIP
        >>> encoding = protected.private_encode(["a", ("red", 1.3), "circle"])  # doctest: +SKIP
        >>> pipe(**protected.release(encoding).inputs())  # doctest: +SKIP
    """

    __slots__ = ("__weakref__",)

    def __repr__(self) -> str:
        return "PrivateEncoding(...)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ContextError(PRIVATE)

    def __getattr__(self, name: str) -> NoReturn:
        raise _Unreadable(PRIVATE)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise ContextError(PRIVATE)


_held: WeakKeyDictionary[PrivateEncoding, tuple[Any, PrivateContext]] = WeakKeyDictionary()


def enclose(handle: Any, context: PrivateContext) -> PrivateEncoding:
    """handle: that alone may release it."""
    made = PrivateEncoding()
    _held[made] = handle, context
    return made


def enclosed(handle: Any, encoding: PrivateEncoding) -> PrivateContext:
    """What it stands for. Raises ContextError for one of another handle."""
    made_by, context = _held.get(encoding, (None, None))
    if made_by is not handle or context is None:
        raise ContextError(
            "This private encoding was made by another protected host: call private_encode of this one. Nothing was spent."
        )
    return context


def read_parts(parts: Any) -> tuple[list[str], list[float]]:
    """Texts and weights. Raises ConfigError; its words quote nothing."""
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts:
        raise ConfigError(PARTS)
    texts, weights = [], []
    for part in parts:
        text, weight = (part, 1.0) if isinstance(part, str) else _pair(part)
        texts.append(text)
        weights.append(weight)
    return texts, weights


def _pair(part: Any) -> tuple[str, float]:
    if not isinstance(part, (tuple, list)) or len(part) != 2:
        raise ConfigError(PARTS)
    text, weight = part
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and abs(weight) <= LARGEST
    if not isinstance(text, str) or not number:
        raise ConfigError(PARTS)
    return text, float(weight)


def weighted(
    context: PrivateContext, weights: torch.Tensor, neutral: Callable[[], torch.Tensor]
) -> PrivateContext:
    """The context with each private row moved along the line from the row that stands there for no text: by its weight.

    A row stays a function of itself, its weight and public numbers, and is clipped as any other. It is charged under the text's own names.

    Args:
        context: a text's.
        weights: [n] of its private rows.
        neutral: gives the rows [n, C] of no text; public.
    """
    if bool((weights == 1).all()):  # as many names as where a weight is another
        return replace(context, parts=(*context.parts, Part((b"not weighted", *context.name))))

    def load() -> Rows:
        rows, first = context.load()
        weight = weights.to(rows).unsqueeze(1)
        base = neutral().to(rows)
        return torch.where(weight == 1, rows, base + weight * (rows - base)), first

    name = (b"weighted", *context.name, plain_bytes(weights))
    return replace(context, name=name, load=load, parts=(Part(context.name), *context.parts))


def row_weights(counts: Sequence[int], weights: Sequence[float], *, start: int, rows: int) -> torch.Tensor:
    """[rows]: the weight of each token's part; 1 for what is of none (starts, ends, padding).

    Args:
        counts: tokens of the first part, of the first two, and so on.
        weights: of the parts.
        start: tokens before the text.
        rows: of the encoding.
    """
    made, before = torch.ones(rows), 0
    for count, weight in zip(counts, weights, strict=True):
        made[min(rows, start + before) : min(rows, start + count)] = weight
        before = count
    return made


def token_counts(tokens: Callable[[str], Sequence[int]], texts: Sequence[str]) -> tuple[list[int], int]:
    """How many tokens the first part has, the first two, and so on; and how many stand before a text.

    Args:
        tokens: ids of a text, with what a tokenizer puts around it, not padded.
        texts: the parts, which one space joins.

    Raises:
        ConfigError: where a word ends, a token does not, so that its rows cannot be told.
    """
    empty = list(tokens(""))
    every = [list(tokens(" ".join(texts[: i + 1]))) for i in range(len(texts))]
    start = int(bool(empty) and empty[0] == every[0][0])
    behind = len(empty) - start
    inner = [ids[start : len(ids) - behind] for ids in every]
    if any(b[: len(a)] != a or len(b) <= len(a) for a, b in zip([[], *inner], inner, strict=False)):
        raise ConfigError(
            "This tokenizer joins parts of a text to one token: weight whole words. Nothing was spent."
        )
    return [len(ids) for ids in inner], start
