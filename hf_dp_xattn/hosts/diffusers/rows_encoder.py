"""`RowsEncoder`: an encoded prompt as rows of one context space, pooled vectors among them, and released rows as an encoded prompt.

*Context space.* A row is [row of text; deviations of pooled vectors]: a row of text with zeros behind it, or, one for each pooled vector,
the stand-in's mean row and that vector less the stand-in's. So pooled vectors are units like rows of text, released with them, at once.

*Back* (post-processing). The denoiser reads as many rows as the stand-in has, under the stand-in's mask: each decoded row as often as its
weight says, by largest remainders. Where rows have no place of their own, k equal ones are read as one of weight k is. A pooled vector is
the stand-in's plus N times the decoded rows' weighted mean deviation, N the number of rows that a context has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import ConfigError, ContextError
from ...mechanisms.context_rows import ContextRows
from ..context import PrivateContext
from .prompt_encoder import PromptEncoder, changed, is_mask, is_rows, tensors_of

ROOM = (
    "a dog in the sun and a cat at the lake, a boat beside a stone wall, birds over green hills, and people who walk under tall trees near "
    "a red house"
)
"""Public: the stand-in. As long as a prompt may be, so that what has only as many rows as tokens has room for a release."""
SWAPPED = (
    "a cat at the lake and a dog in the sun, a boat beside a stone wall, birds over green hills, and people who walk under tall trees near "
    "a red house"
)  # the same words, so that encoders whose rows are as many as tokens give as many
UNITS = "This pipeline's rows are released with unit='row' or unit='context'."
SHORT = "red dogs"  # begins with another word


def repeated(context: ContextRows, count: int) -> torch.Tensor:
    """[count, C]: decoded rows, each as often as its weight says. Post-processing."""
    shares = torch.softmax(context.log_weights.to("cpu", torch.float64), 0) * count
    whole = shares.floor().to(torch.int64)
    left = count - int(whole.sum())
    most = torch.argsort(shares - whole, descending=True, stable=True)[:left]
    whole[most] += 1
    return context.rows[torch.arange(len(whole)).repeat_interleave(whole).to(context.rows.device)]


class RowsEncoder(PromptEncoder):
    """Of one pipeline. text_channels: of a row of text. vectors: where pooled vectors stand, and their channels behind the text's."""

    stand_in, others = ROOM, (SWAPPED,)

    def __init__(self, pipe: Any, modules: Sequence[torch.nn.Module]) -> None:
        self._open(pipe, modules)
        first, at, short = (dict(tensors_of(self._probe(t))) for t in (ROOM, SWAPPED, SHORT))
        if [t.shape for t in first.values()] != [t.shape for t in at.values()]:
            raise self._refuse("how many rows its encode_prompt gives depends on the order of the words")
        told = [w for w, t in first.items() if t.is_floating_point() and bool(changed(t, at[w]).any())]
        rows = [w for w in told if first[w].ndim > 2]
        if len(rows) != 1 or not is_rows(first[rows[0]]):
            raise self._refuse(
                f"its encode_prompt gives {len(rows)} sequences of rows that depend on the prompt; one is known how to release"
            )
        self.where = rows[0]
        length = first[self.where].shape[1]
        masks = [w for w, t in first.items() if t.ndim == 2 and t.shape[1] == length and is_mask(t)]
        self.mask_at = masks[0] if masks else None
        states = first[self.where]
        alike = {w: short.get(w) for w in (self.where, *masks[:1])}
        self.padded = all(t is not None and t.shape == first[w].shape for w, t in alike.items()) and (
            self.mask_at is None or torch.equal(short[self.mask_at], first[self.mask_at])
        )
        self.text_channels = states.shape[-1]
        starts = [t[self.where][0, 0] for t in (at, short)]  # a causal encoder's first row is made of no word
        self.public_rows = int(self.mask_at is None and all(torch.equal(states[0, 0], s) for s in starts))
        fixed = self.where in short and short[self.where].shape == states.shape
        self.longest = length if fixed else None
        # of texts of several lengths, how far a mean is from its sum is private
        pooled = [w for w in told if first[w].ndim == 2 and w not in masks] if self.padded else []
        self.vectors: dict[tuple[int, ...], slice] = {}
        self.channels = self.text_channels
        for where in pooled:
            self.vectors[where] = slice(self.channels, self.channels + first[where].shape[-1])
            self.channels += first[where].shape[-1]
        shown = self.shown(first, 0)
        self.rows = len(shown) + len(pooled)
        self._usual = shown[self.public_rows :].float().mean(0)
        self._pooled = {where: first[where][0].float() for where in pooled}
        self.first = self._padded(shown[: self.public_rows]).detach().clone()

    # ---- private text as rows ----------------------------------------------------------------------------------------------

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        return F.pad(rows.float(), (0, self.channels - self.text_channels))

    def _given(self, rows: torch.Tensor) -> PrivateContext:
        """Of embeddings [n, C], whose pooled vectors are the stand-in's."""
        if rows.shape[-1] != self.text_channels:
            raise ContextError(
                f"Embeddings must be [n, {self.text_channels}] or [B, n, {self.text_channels}], got rows of {rows.shape[-1]}."
            )
        if not bool(torch.isfinite(rows).all()):
            raise ContextError("The embeddings hold NaN or Inf; nothing was spent.")
        return super()._given(self._padded(rows))

    def name(self, context: Any, *, phrases: bool) -> list[PrivateContext]:
        if phrases:
            raise ConfigError(UNITS)
        return super().name(context, phrases=False)

    def weighted(self, texts: Sequence[str], weights: Sequence[float], *, apart: bool) -> PrivateContext:
        raise ConfigError(
            f"{type(self.pipe).__name__} is given released rows, of which no token is known: weights are for Stable Diffusion (1, 2, XL "
            "and kin). Nothing was spent."
        )

    def whole(self, tensors: dict[tuple[int, ...], torch.Tensor], element: int = 0) -> torch.Tensor:
        """Rows [n, C] of context space of one batch element, but for public ones at its start."""
        rows = self._padded(self.shown(tensors, element)[self.public_rows :])
        extra = rows.new_zeros(len(self.vectors), self.channels)
        extra[:, : self.text_channels] = self._usual.to(rows)
        for i, (where, block) in enumerate(self.vectors.items()):
            extra[i, block] = (tensors[where][element].float() - self._pooled[where]).to(rows)
        return torch.cat([rows, extra])

    # ---- released rows as an encoded prompt --------------------------------------------------------------------------------

    def place(
        self,
        context: ContextRows,
        where: tuple[int, ...],
        tensors: dict[tuple[int, ...], torch.Tensor],
        element: int,
    ) -> torch.Tensor:
        """What stands in one output for one batch element: rows [n, C] or a pooled vector [P]. tensors: the stand-in's outputs."""
        given = tensors[where][element]
        block = self.vectors.get(where)
        if block is not None:
            weights = torch.softmax(context.log_weights.to("cpu", torch.float64), 0)
            mean = weights @ context.rows[:, block].to("cpu", torch.float64)
            count = self.rows - self.public_rows
            return given + (count * mean).to(given)
        rows = given.clone()
        mask = None if self.mask_at is None else tensors.get(self.mask_at)
        shown = torch.ones(len(rows), dtype=torch.bool) if mask is None else mask[element].cpu() > 0
        at = shown.nonzero().flatten()[self.public_rows :].to(rows.device)
        rows[at] = repeated(context, len(at))[:, : self.text_channels].to(rows)
        return rows
