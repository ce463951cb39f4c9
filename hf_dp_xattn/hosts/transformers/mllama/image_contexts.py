"""Private images, validated and named before they are encoded; and which text tokens may see which tile, which is public."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch

from ....errors import ConfigError, ContextError
from ...context import Part, PrivateContext, Rows, casts, from_embeddings, plain_bytes
from ...lengths import dimensions
from ...placeholder import holds_placeholder, read_tags
from ..encoder_decoder.document_contexts import MakeTrial
from .mllama_probing import STATES

PIXELS, RATIO_IDS, RATIO_MASK = "pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"
IMAGE_INPUTS = (PIXELS, RATIO_IDS, RATIO_MASK, STATES)
MASK = "cross_attention_mask"
_BESIDE = ("num_tiles",)  # an image processor's own count, which the mask says too
ONE_IMAGE = (
    "One image for each text is supported so far: with several, tokens see different images, and one release is of one context that all "
    "tokens read alike."
)
Encode = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor | None]]
"""Inputs of one image -> rows [n, C] of all tiles and the mask [n] of those of tiles that are no padding."""


def gather(context: Any) -> dict[str, torch.Tensor]:
    """The image's inputs by name, from a mapping or from rows of the projected vision output.

    Raises:
        ConfigError: an unknown or missing name; ContextError: a wrong type. Nothing was spent.
    """
    if isinstance(context, torch.Tensor):
        context = {STATES: context}
    if not isinstance(context, Mapping):
        raise ContextError(
            "A model has no image processor: pass protected.release(**processor.image_processor(image, return_tensors='pt'))."
        )
    inputs = {str(k): v for k, v in context.items() if v is not None and k not in _BESIDE}
    unknown = sorted(set(inputs) - set(IMAGE_INPUTS))
    if unknown:
        raise ConfigError(
            f"Unknown image input(s): {', '.join(unknown)}. Known: {', '.join(IMAGE_INPUTS)}; text goes to release.inputs(...)."
        )
    if set(inputs) not in ({STATES}, {PIXELS, RATIO_IDS, RATIO_MASK}):
        raise ConfigError(
            f"Pass one image by {PIXELS}, {RATIO_IDS} and {RATIO_MASK}, or its projected rows by {STATES}."
        )
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ContextError(f"`{name}` must be a tensor, got {type(value).__name__}.")
    return inputs


def is_placeholder(states: Any) -> TypeGuard[torch.Tensor]:
    return (
        isinstance(states, torch.Tensor)
        and states.ndim == 3
        and any(tag is not None for tag in read_tags(states))
    )


def name_images(
    inputs: dict[str, torch.Tensor],
    channels: int,
    patches: int,
    encode: Encode,
    trial: MakeTrial,
    *,
    keep_padding: bool,
) -> list[PrivateContext]:
    """One context per batch element, of checked inputs (`VisionSide.check`).

    patches: rows of a tile. keep_padding: rows of padding tiles are kept (exact attention only: there, transformers lets tokens that see
    no tile attend to them).

    Raises:
        ContextError: rows that are empty, NaN, or a placeholder. Nothing was spent.
    """
    if STATES in inputs:
        states = inputs[STATES]
        if holds_placeholder(states):
            raise ContextError(f"This is a placeholder of a release, not a context; pass it as {STATES}.")
        batch = states.unsqueeze(0) if states.ndim == 2 else states
        if batch.ndim != 3 or 0 in batch.shape:
            raise ContextError(
                f"`{STATES}` must be [B, n, C] or [n, C], and not empty, got {dimensions(states)}."
            )
        return [from_embeddings(rows, channels) for rows in batch]
    return [
        _image(
            {name: value[i : i + 1].detach().clone() for name, value in inputs.items()},
            patches,
            encode,
            trial,
            keep_padding,
        )
        for i in range(len(inputs[PIXELS]))
    ]


def _image(
    inputs: dict[str, torch.Tensor], patches: int, encode: Encode, trial: MakeTrial, keep_padding: bool
) -> PrivateContext:
    """The ledger knows an image by the pixels of its tiles, whatever aspect ratio it was said to have. Tiles of padding are no part of it;
    what stands in them may change how the others are encoded, and makes another release of the same image."""

    def load() -> Rows:
        rows, kept = encode(inputs)
        rows = rows if keep_padding or kept is None else rows[kept]
        return rows, rows[:0]

    count = int(inputs[RATIO_MASK].sum()) * patches
    pixels = inputs[PIXELS]
    shown = inputs[RATIO_MASK].flatten().bool()
    former = Part(_name(pixels), former=True)  # with the tiles of padding
    variant = repr([inputs[n].flatten().tolist() for n in (RATIO_IDS, RATIO_MASK)]).encode()
    if not bool(shown.all()):
        variant += plain_bytes(pixels[:, :, ~shown])
    kept = inputs[RATIO_MASK].flatten().bool().repeat_interleave(patches)
    return PrivateContext(
        count,
        count,
        _name(pixels[:, :, shown]),
        load,
        variant=variant,
        parts=(*(Part(_name(t)) for t in casts(pixels[:, :, shown])), former),
        padded=True,
        trials=(trial(inputs),),
        kept=kept,
    )


def _name(pixels: torch.Tensor) -> tuple[bytes, ...]:
    return PIXELS.encode(), repr(tuple(pixels.shape)).encode(), plain_bytes(pixels)


def check_mask(mask: Any, rows: Sequence[int], patches: int) -> None:
    """Whether a `cross_attention_mask` [B, m, images, tiles] is one that a release can follow. rows: of each element's image.

    A release holds the rows of all tiles that are no padding, so each token sees all of those or none; what it says about padding tiles
    when it shows them all changes nothing.

    Raises:
        ConfigError: several images; tokens that see different tiles.
    """
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.ndim != 4 or mask.shape[0] != len(rows):
        raise ConfigError(
            f"{MASK} must be [{len(rows)}, tokens, 1, tiles], as the model's processor gives it."
        )
    if mask.shape[2] != 1:
        raise ConfigError(ONE_IMAGE)
    seen = visible_tiles(mask)
    union = seen.any(1)
    alike = ((seen == union.unsqueeze(1)).all(-1) | ~seen.any(-1)).all(1)
    count = union.sum(-1)
    known = torch.tensor(list(rows), device=mask.device)
    whole = (count == 0) | (count == mask.shape[-1]) | (count * patches == known)
    if not bool((alike & whole).all()):
        raise ConfigError(
            f"{MASK} shows some tokens other tiles than others, or hides tiles of the image: a release is read whole. Pass the processor's "
            "mask, or none."
        )


def visible_tiles(mask: torch.Tensor) -> torch.Tensor:
    """bool [B, m, tiles] of a mask [B, m, 1, tiles], as the model reads it."""
    return mask[:, :, 0] == 1


def visible_rows(mask: torch.Tensor, patches: int) -> torch.Tensor:
    """bool [B, m, tiles * patches]: what each token attends to in the unprotected model, where one that sees no tile sees all rows."""
    seen = visible_tiles(mask)
    return (seen | ~seen.any(-1, keepdim=True)).repeat_interleave(patches, dim=-1)
