"""Private contexts of encoder-decoder models: documents, recordings or pictures, validated and named before they are encoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from ....errors import ConfigError, ContextError
from ...content_names import id_parts, name_of_ids
from ...context import Part, PrivateContext, Rows, Trial, casts, from_embeddings, plain_bytes
from ...grouping import whole
from ...lengths import dimensions
from ...placeholder import holds_placeholder
from .encoder_outputs import last_hidden_state

MAIN_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
MASK = "attention_mask"
STATES = "encoder_outputs"
TYPES = "token_type_ids"
ENCODER_INPUTS = (*MAIN_INPUTS, MASK, TYPES, STATES)
Encode = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor | None]]
"""Encoder inputs of batch 1 -> rows [n, C] and the mask [n] of those that are rows, or None where all are."""
MakeTrial = Callable[[dict[str, torch.Tensor]], Trial]


def gather(context: Any) -> dict[str, torch.Tensor]:
    """The encoder inputs by name: from a mapping, token ids, or rows of the encoder's output.

    Raises:
        ConfigError: an unknown name, none or several inputs; ContextError: a wrong type. Nothing was spent.
    """
    if isinstance(context, (str, list, tuple)):
        raise ContextError(
            "A model has no tokenizer: pass protected.release(**tokenizer(texts, return_tensors='pt', padding=True))."
        )
    if isinstance(context, torch.Tensor):
        context = {STATES if context.is_floating_point() else "input_ids": context}
    if not isinstance(context, Mapping):
        raise ContextError(f"A context is a tensor or named encoder inputs, got {type(context).__name__}.")
    inputs = {str(k): v for k, v in context.items() if v is not None}
    unknown = sorted(set(inputs) - set(ENCODER_INPUTS))
    if unknown:
        raise ConfigError(
            f"Unknown encoder input(s): {', '.join(unknown)}. Known: {', '.join(ENCODER_INPUTS)}."
        )
    main = [k for k in inputs if k not in (MASK, TYPES)]
    if len(main) != 1:
        raise ConfigError(f"Pass one context by one of {', '.join((*MAIN_INPUTS, STATES))}.")
    if main[0] == STATES:
        inputs[STATES] = last_hidden_state(inputs[STATES])
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ContextError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    return inputs


def name_inputs(
    inputs: dict[str, Any],
    channels: int,
    encode: Encode,
    trial: MakeTrial,
    special: Collection[int] = (),
) -> list[PrivateContext]:
    """One context per batch element. special: ids of the host's special tokens.

    Raises:
        ContextError: a wrong rank, NaN, a mask that does not fit, no rows. Nothing was spent.
    """
    name = next(k for k in inputs if k not in (MASK, TYPES))
    main, mask, types = inputs[name], inputs.get(MASK), inputs.get(TYPES)
    if name in ("input_ids", STATES) and main.ndim == {"input_ids": 1, STATES: 2}[name]:
        main = main.unsqueeze(0)
        mask = mask.unsqueeze(0) if mask is not None and mask.ndim == 1 else mask
        types = types.unsqueeze(0) if types is not None and types.ndim == 1 else types
    if 0 in main.shape or main.ndim < 2:
        raise ContextError(f"The context is empty, or `{name}` has a wrong shape: {dimensions(main)}.")
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != main.shape[0]):
        raise ContextError("`attention_mask` must be [B, n], of as many contexts as there are.")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise ContextError("`attention_mask` must hold 1 for rows and 0 for padding; nothing was spent.")
    if main.is_floating_point() and not bool(torch.isfinite(main).all()):
        if name == STATES and holds_placeholder(main):
            raise ContextError(
                "This is a placeholder of a release, not a context; pass it as encoder_outputs."
            )
        raise ContextError(f"`{name}` holds NaN or Inf; nothing was spent.")
    masks = [None] * len(main) if mask is None else [m.to(torch.bool) for m in mask]
    if types is not None and types.shape != main.shape[:2]:
        raise ContextError(f"`{TYPES}` must have one number for each token; nothing was spent.")
    each = [None] * len(main) if types is None else list(types)
    return [
        _element(name, row, m, t, channels, encode, trial, special)
        for row, m, t in zip(main, masks, each, strict=True)
    ]


def _element(
    name: str,
    main: torch.Tensor,
    mask: torch.Tensor | None,
    types: torch.Tensor | None,
    channels: int,
    encode: Encode,
    trial: MakeTrial,
    special: Collection[int],
) -> PrivateContext:
    """Masked rows, frames and samples are no part of the name, so one document or recording has one name however it was padded. Padding of
    rows at the end is cut off; other padding may move positions, and makes another release of the same content."""
    rows, positions = main.shape[0], mask
    if name in ("input_ids", "inputs_embeds", STATES) and mask is not None:
        if len(mask) != rows:
            raise ContextError("`attention_mask` must have an entry for each row of the context.")
        if not bool(mask.any()):
            raise ContextError("The attention mask leaves no row: there is nothing to release.")
        last = int(mask.nonzero()[-1]) + 1
        main, mask = main[:last], mask[:last]
        mask = None if bool(mask.all()) else mask
    if name == STATES:
        kept = main if mask is None else main[mask]
        context = from_embeddings(kept, channels)
        return PrivateContext(
            rows, len(kept), context.name, context.load, parts=context.parts, kept=positions
        )
    inputs = {name: main.unsqueeze(0).detach().clone()}  # what was named is what is released
    if mask is not None:
        inputs[MASK] = mask.unsqueeze(0).to(torch.int64)
    features = name not in ("input_ids", "inputs_embeds")
    count = len(main) if mask is None else int(mask.sum())
    identity, parts = _names(name, main, mask, special)
    # positions may be counted from the mask, or from the padding's own ids
    variant = b"" if mask is None else plain_bytes(mask) + plain_bytes(main)
    if types is not None:  # another encoding of the same tokens
        inputs[TYPES] = types[: len(main)].unsqueeze(0).detach().clone()
        variant += b"types" + plain_bytes(inputs[TYPES])

    def load() -> Rows:
        states, kept = encode(inputs)
        states = states if kept is None else states[kept]
        return states, states[:0]

    trials = (trial(inputs),)
    if features:  # how many rows an encoder makes of them is known when they were encoded: a function of public shapes and masks
        return PrivateContext(0, 0, identity, load, variant=variant, parts=parts, trials=trials)
    return PrivateContext(
        rows, count, identity, load, variant=variant, parts=parts, trials=trials, kept=positions
    )


def _names(
    name: str, main: torch.Tensor, mask: torch.Tensor | None, special: Collection[int]
) -> tuple[tuple[bytes, ...], tuple[Part, ...]]:
    """Its name, made of what the mask shows, and what is charged as well: ids as other hosts may have been given them, and what an earlier
    version called it. Where a mask may be one over several axes, it is known by what it shows along each."""
    if name in ("input_ids", "inputs_embeds"):
        seen = main if mask is None else main[mask]
        plain = _plain_name(name, seen)
        if name == "inputs_embeds":
            return plain, tuple(Part(_plain_name(name, t)) for t in casts(seen))
        parts = id_parts(seen, special, range(len(seen)))
        return name_of_ids(seen), (*parts, Part(plain, former=True))
    axes = [] if mask is None else [axis for axis in range(main.ndim) if main.shape[axis] == len(mask)]
    shown = [main.index_select(axis, mask.nonzero().flatten()) for axis in axes] if mask is not None else []
    names = [_plain_name(name, t) for whole in shown or [main] for t in (whole, *casts(whole))]
    others = [Part(other) for other in names[1:]]
    if mask is not None:  # with what the mask hides
        others.append(Part((*_plain_name(name, main)[:-1], plain_bytes(mask)), former=True))
    return names[0], tuple(dict.fromkeys(others))


def _plain_name(name: str, seen: torch.Tensor) -> tuple[bytes, ...]:
    return name.encode(), repr(tuple(seen.shape)).encode(), plain_bytes(seen), b""


def join_documents(documents: Sequence[PrivateContext], unit: str) -> PrivateContext:
    """ONE context of documents that are encoded apart from each other; with unit="group", each is a group. Each is charged by its own name,
    once: equal ones are units of their own, as if of several authors.

    Raises:
        ContextError: the number of rows of a document is not known before it is encoded.
    """
    counts = [d.private_rows for d in documents]
    if not all(counts):
        raise ContextError('groups="documents" takes token ids, embeddings, or hidden states.')
    names = tuple(d.name for d in documents)

    def load() -> Rows:
        rows = torch.cat([d.load()[0] for d in documents])
        return rows, rows[:0]

    groups = torch.arange(len(documents)).repeat_interleave(torch.tensor(counts))
    row_groups = groups if unit == "group" else None
    total, encoder = sum(counts), documents[0].encoder
    trials = tuple(t for d in documents for t in d.trials)
    if len(documents) == 1:
        variant = documents[0].variant
        parts = documents[0].parts
        return PrivateContext(
            total, total, names[0], load, row_groups, variant, parts, trials=trials, encoder=encoder
        )
    variants = [d.variant for d in documents]
    variant = b"".join(str(len(v)).encode() + b":" + v for v in variants) if any(variants) else b""
    former = [next((p.name for p in d.parts if p.former), d.name) for d in documents]
    parts = tuple(
        dict.fromkeys(
            (Part(_corpus(former), former=True), *(p for d in documents for p in units_of_document(d)))
        )
    )
    name = _corpus(names)
    return PrivateContext(
        total, total, name, load, row_groups, variant, parts, trials=trials, encoder=encoder
    )


def _corpus(names: Sequence[tuple[bytes, ...]]) -> tuple[bytes, ...]:
    return (b"documents", *(part for n in names for part in (str(len(n)).encode(), *n)))


def units_of_document(document: PrivateContext) -> list[Part]:
    """What is charged of a document of a corpus: it is one unit."""
    charge = Part(document.name, whole(document.private_rows))
    return [charge] + [
        Part(p.name, whole(document.private_rows if p.rows is None else len(p.rows)), former=p.former)
        for p in document.parts
    ]
