"""Private contexts of a Stable Diffusion pipeline: texts, phrases, ids and embeddings, validated and named before they are encoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import ContextError
from ..content_names import filled, folded_part, id_parts, name_of_ids, name_of_text, units_of_text
from ..context import Part, PrivateContext, Rows, from_embeddings, plain_bytes
from ..lengths import dimensions
from ..placeholder import holds_placeholder
from ..private_encoding import row_weights, token_counts, weighted
from .phrases import check_phrases, encode_tokens, split_phrases
from .text_side import TextSide, as_texts

_NAMES = 3  # of token ids: padded, as they were given, and their content


def from_ids(
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    text: TextSide,
    whole: str | None = None,
    *,
    length: int | None = None,
) -> PrivateContext:
    """A context given by padded token ids [length]; whole: the text that they are of, which is charged as well. length: how many ids there
    were before."""

    def load() -> Rows:
        return text.private_rows(ids, mask)

    rows, first = ids.shape[0], int(text.first_row_is_public)
    held = _unpadded(ids, mask, length)
    name = name_of_ids(ids)
    own = [Part(name), *id_parts(ids[held], text.special_ids, [i - first for i in held])]
    parts = filled(own, _NAMES, name)[1:]
    parts += [] if whole is None else [Part(name_of_text(whole)), folded_part(whole, None)]
    return PrivateContext(
        rows,
        rows - first,
        name,
        load,
        variant=text.mask_seen(mask),
        parts=tuple(parts),
        padded=True,
        trials=(text.trial(),),
        kept=torch.arange(rows) >= first,
        ambiguous=length,
        encoder=text.modules,
    )


def _unpadded(ids: torch.Tensor, mask: torch.Tensor | None, length: int | None) -> list[int]:
    """The positions that are no padding."""
    if mask is not None:
        return [int(i) for i in mask.nonzero().flatten()]
    return list(range(len(ids) if length is None else length))


def from_phrases(phrases: Sequence[object], text: TextSide, whole: str | None = None) -> PrivateContext:
    """A context of phrases that are encoded one by one, named by them, whatever stood between. The whole text is charged as well: `whole`,
    or the phrases with commas between; as far as the encoder reads it.

    Raises:
        ContextError: see `check_phrases`.
    """
    texts = check_phrases(phrases)
    tokens = [text.tokenize_private(phrase) for phrase in texts]
    prompt = ", ".join(texts) if whole is None else whole
    ids, mask = text.tokenize(prompt)

    def load() -> Rows:
        return torch.cat(encode_tokens(text, tokens)), text.public_first_row()

    each = text.length - int(text.first_row_is_public)
    groups = torch.arange(len(tokens)).repeat_interleave(each)
    name = (b"phrases", *(plain_bytes(t) for t, _ in tokens))
    held = ids[_unpadded(ids, mask, None)]
    own = [Part(name_of_ids(ids), name), *id_parts(held, text.special_ids, None, name)]
    parts = (
        *filled(own, _NAMES, name),
        Part(name_of_text(prompt), units_of_text(texts)),
        folded_part(prompt, texts),
    )
    trials = (text.trial(),)
    return PrivateContext(
        text.length,
        len(groups),
        name,
        load,
        groups,
        parts=parts,
        padded=True,
        trials=trials,
        encoder=text.modules,
    )


def name_phrases(context: Any, text: TextSide | None) -> PrivateContext:
    """Validates and names ONE context: a list of phrases, or a string that is split into them.

    Raises:
        ContextError: it is neither, or a phrase is empty, or there are none or too many. Nothing was spent.
    """
    if not isinstance(context, (str, list, tuple)):
        raise ContextError(
            f'groups="phrases" takes a string or a list of strings, got {type(context).__name__}; nothing was spent.'
        )
    side = _require(text)
    if isinstance(context, str):
        return from_phrases(split_phrases(context), side, context)
    return from_phrases(context, side)


def name_contexts(
    context: Any, text: TextSide | None, channels: int, *, phrases: bool = False
) -> list[PrivateContext]:
    """Validates and names `context`: a string, list of strings, token ids [n] / [B, n], or embeddings [n, C] / [B, n, C].

    phrases: each string is a context that is split into phrases.

    Raises:
        ContextError, ConfigError: it is none of these, or not valid. Nothing was spent.
    """
    if isinstance(context, torch.Tensor):
        if context.ndim == 0 or context.shape[0] == 0:
            raise ContextError("The context is empty.")
        if context.is_floating_point():
            if context.ndim not in (2, 3):
                raise ContextError(f"Embeddings must be [n, C] or [B, n, C], got {dimensions(context)}.")
            batch = context if context.ndim == 3 else context.unsqueeze(0)
            if holds_placeholder(batch):
                raise ContextError(
                    "This is a placeholder of a release, not a context; pass it as prompt_embeds."
                )
            return [from_embeddings(rows, channels) for rows in batch]
        if context.ndim not in (1, 2):
            raise ContextError(f"Token ids must be [n] or [B, n], got {dimensions(context)}.")
        ids = context if context.ndim == 2 else context.unsqueeze(0)
        side = _require(text)
        return [from_ids(side.pad_ids(row), None, side, length=len(row)) for row in ids]
    texts = as_texts(context, "context")
    side = _require(text)
    if phrases:
        return [from_phrases(split_phrases(t), side, t) for t in texts]
    return [from_ids(*side.tokenize_private(t), side, t) for t in texts]


def name_weighted(
    texts: Sequence[str], weights: Sequence[float], text: TextSide | None, *, apart: bool
) -> PrivateContext:
    """Validates and names ONE prompt of weighted parts. apart: each is encoded by itself, and is a unit; else a space joins them.

    Raises:
        ContextError, ConfigError: no parts, an empty one, or tokens that no weight can be for. Nothing was spent.
    """
    side = _require(text)
    parts, first = check_phrases(texts), int(side.first_row_is_public)
    if apart:
        context = from_phrases(parts, side)
        each = torch.tensor(weights).repeat_interleave(side.length - first)
    else:
        whole = " ".join(parts)
        counts, start = token_counts(side.token_ids, parts)
        context = from_ids(*side.tokenize_private(whole), side, whole)
        each = row_weights(counts, weights, start=start, rows=side.length)[first:]
    times = len(parts) if apart else 1
    return weighted(context, each, lambda: side.private_rows(*side.tokenize(""))[0].repeat(times, 1))


def _require(text: TextSide | None) -> TextSide:
    if text is None:
        raise ContextError(
            "This host has no text encoder: release embeddings [n, C] or [B, n, C] instead of text or ids."
        )
    text.require()
    return text
