"""Private prefixes: token ids, validated and named before they are encoded.

*Name.* The ledger's name of a prefix is made of its private token ids: behind another public head (today's date), with another padded
length or split into other segments it is the same prefix, and is charged to the same budget. What other hosts may have been given is
charged as well: the ids behind that head, and without special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ....errors import ConfigError, ContextError
from ...content_names import id_parts, name_of_ids
from ...context import Part, PrivateContext, plain_bytes
from .prefix_encoder import PrefixEncoder

BUCKET = 64
SEGMENTS = "segments"
NOT_IDS = "Token ids of {what} must be a list or tensor of integers, [n]; nothing was spent."


@dataclass(frozen=True, eq=False, repr=False)
class Prefix:
    """head [h]: public token ids. segments: private ones, each encoded apart from the others (one: a single sequence). slots: the public
    padded length."""

    head: torch.Tensor
    segments: tuple[torch.Tensor, ...]
    slots: int


def as_ids(ids: Any, what: str, size: int) -> torch.Tensor:
    """Token ids [n] on the CPU, int64.

    Raises:
        ContextError: it is no list or tensor of integers in [0, size). Nothing was spent.
    """
    if isinstance(ids, Mapping) or hasattr(ids, "input_ids"):  # what a tokenizer or chat template gave
        _refuse_beside(ids, what)
        ids = ids["input_ids"]
    if isinstance(ids, str):
        raise ContextError(
            f"A model has no tokenizer: pass the token ids of {what}, tokenizer(text, add_special_tokens=False).input_ids."
        )
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise ContextError(NOT_IDS.format(what=what)) from None
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise ContextError(f"Token ids of {what} must be integers, got {tensor.dtype}; nothing was spent.")
    if tensor.ndim == 2 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.ndim != 1:
        raise ContextError(NOT_IDS.format(what=what))
    tensor = tensor.detach().to("cpu", torch.int64)
    if bool(((tensor < 0) | (tensor >= size)).any()):
        raise ContextError(f"Token ids of {what} must lie in [0, {size}); nothing was spent.")
    return tensor


def _refuse_beside(context: Any, what: str) -> None:
    """Raises ContextError for what the unprotected model would read beside the token ids: without a word it would have no effect."""
    for name, harmless in (("attention_mask", 1), ("token_type_ids", 0)):
        value = context.get(name) if isinstance(context, Mapping) else getattr(context, name, None)
        if value is not None and not bool((torch.as_tensor(value) == harmless).all()):
            raise ContextError(
                f"{name} of {what} is not supported: pass the token ids alone, without padding; nothing was spent."
            )


def padded_length(longest: int, bucket: int | None) -> int:
    """The public length: the next multiple of 64, or `bucket`. Raises ContextError where the tokens do not fit a given one."""
    if bucket is None:
        return -(-longest // BUCKET) * BUCKET
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
        raise ConfigError("prefix_bucket must be a positive integer.")
    if longest > bucket:
        raise ContextError(
            f"The prefix (or one of its segments) does not fit prefix_bucket={bucket} positions; nothing was spent."
        )
    return bucket


def read_prefixes(context: Any, groups: Any, public_head: Any, bucket: int | None, size: int) -> list[Prefix]:
    """One prefix per context: of token ids [n] or [B, n], or (groups="segments") ONE of a list of token id lists.

    public_head: how many tokens at the start are public, or their ids, which then stand before those of `context`.

    Raises:
        ContextError, ConfigError: not valid; nothing was spent.
    """
    apart = isinstance(groups, str)
    if apart and groups != SEGMENTS:
        raise ConfigError('`groups` must be integers [n] or "segments".')
    batch: list[list[torch.Tensor]]
    if apart:
        if not isinstance(context, (list, tuple)) or not context:
            raise ContextError('groups="segments" takes a list of token id lists, one for each segment.')
        batch = [[as_ids(part, "a segment", size) for part in context]]
    elif isinstance(context, torch.Tensor) and context.ndim == 2:
        batch = [[as_ids(row, "a prefix", size)] for row in context]
    else:
        batch = [[as_ids(context, "a prefix", size)]]
    counted = isinstance(public_head, int) and not isinstance(public_head, bool)
    if counted and apart and public_head:
        raise ConfigError('With groups="segments", pass the token ids of the public head: public_head=[...].')
    prefixes = []
    for segments in batch:
        if counted:
            if not 0 <= public_head <= len(segments[0]):
                raise ConfigError(
                    f"public_head={public_head} is not a number of leading tokens of this prefix."
                )
            head = segments[0][:public_head]
            segments = segments if apart else [segments[0][public_head:]]
        else:
            head = as_ids(public_head, "the public head", size)
        if not segments or not all(len(s) for s in segments):
            raise ContextError("The prefix (or one of its segments) has no private token; nothing was spent.")
        prefixes.append(Prefix(head, tuple(segments), padded_length(max(map(len, segments)), bucket)))
    return prefixes


def name_prefix(prefix: Prefix, encoder: PrefixEncoder, unit: str, *, apart: bool) -> PrivateContext:
    """The context of a prefix; each segment is a group where they are encoded apart.

    Raises:
        ContextError: the model has not so many positions. Nothing was spent.
    """
    encoder.check(len(prefix.head), prefix.slots)
    groups = None
    if apart and unit == "group":
        lengths = torch.tensor([len(s) for s in prefix.segments])
        groups = torch.arange(len(lengths)).repeat_interleave(lengths)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        return encoder.encode(prefix.head, prefix.segments)

    private = torch.cat(prefix.segments)
    splits = torch.tensor([prefix.slots, len(prefix.segments), *(len(s) for s in prefix.segments)])
    variant = plain_bytes(splits) + plain_bytes(prefix.head)
    special, rows = encoder.special_ids, range(len(private))
    parts = id_parts(private, special, rows)
    if len(prefix.head):  # as another host may have been given it
        parts += id_parts(torch.cat([prefix.head, private]), special, [-1] * len(prefix.head) + [*rows])
    former = Part((b"prefix", plain_bytes(private)), former=True)
    name = name_of_ids(private)
    return PrivateContext(
        prefix.slots, len(private), name, load, groups, variant, (*parts, former), padded=True
    )


def check_groups(groups: Any, prefixes: Sequence[Prefix]) -> torch.Tensor | None:
    """Groups [n] of the private tokens of one sequence. Raises ContextError where they do not fit."""
    if groups is None or isinstance(groups, str):
        return None
    for prefix in prefixes:
        n, h = len(prefix.segments[0]), len(prefix.head)
        if not isinstance(groups, torch.Tensor) or groups.shape not in ((n,), (n + h,)):
            raise ContextError("`groups` must be an integer tensor [n], one number for each private token.")
    return groups[-len(prefixes[0].segments[0]) :]
