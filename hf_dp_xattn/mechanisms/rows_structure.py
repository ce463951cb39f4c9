"""`RowsStructure`: attention over a few weighted rows, released and public ones alike, by ordinary scaled dot products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..errors import ConfigError, ReleaseError
from .merge import exact_partial
from .structure import AttentionStructure, ExactStructure

ROWS_MULTIPLE = (
    8  # the number of rows is padded to it: fewer shapes for torch.compile, and aligned masks for its kernels
)


@dataclass(frozen=True)
class RowsStructure:
    """out = softmax(scale q k_r + bias_r) v_r. All of it is post-processing of a release, or public.

    key [B, H, R, d], value [B, H, R, dv] in the model's dtype; bias [B, 1, 1, R]: log weights, 0 for an exact row, -inf for padding.
    """

    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    scale: float

    def _check(self, query: torch.Tensor) -> None:
        batch, heads, _, dim = self.key.shape
        if query.ndim != 4 or (query.shape[1], query.shape[3]) != (heads, dim):
            raise ConfigError(f"query must be [B, {heads}, m, {dim}], got {list(query.shape)}.")
        if batch not in (1, query.shape[0]):
            raise ConfigError(f"query has batch {query.shape[0]}, the structure {batch}.")

    def partial(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._check(query)
        return exact_partial(query, self.key, self.value, self.scale, self.bias)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        self._check(query)
        dtype = query.dtype
        shape = (query.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(
            query,
            self.key.to(dtype).expand(shape),
            self.value.to(dtype).expand(shape),
            attn_mask=self.bias.to(dtype).expand(shape),
            scale=self.scale,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"key": self.key, "value": self.value, "bias": self.bias}

    def to(self, device: torch.device | str) -> RowsStructure:
        return RowsStructure(**{n: t.to(device) for n, t in self.tensors().items()}, scale=self.scale)

    def select(self, index: torch.Tensor) -> RowsStructure:
        return RowsStructure(
            **{n: t.index_select(0, index) for n, t in self.tensors().items()}, scale=self.scale
        )

    def padded(self, rows: int) -> RowsStructure:
        """With hidden rows up to `rows` in all; they change no output."""
        more = rows - self.key.shape[2]
        if more == 0:
            return self
        return RowsStructure(
            F.pad(self.key, (0, 0, 0, more)),
            F.pad(self.value, (0, 0, 0, more)),
            F.pad(self.bias, (0, more), value=-math.inf),
            self.scale,
        )


def as_rows(structure: AttentionStructure) -> AttentionStructure:
    """Exact rows (`mechanism="none"`) as ones that may be batched with others of another number; anything else as it is."""
    if not isinstance(structure, ExactStructure):
        return structure
    bias = structure.key.new_zeros(1, 1, 1, structure.key.shape[2])
    return RowsStructure(structure.key, structure.value, bias, structure.scale)


def stack_rows(structures: Sequence[RowsStructure]) -> RowsStructure:
    """Concatenates along the batch; shorter ones are padded. Raises ReleaseError where they are of different layers."""
    first = structures[0]
    shape = (first.key.shape[1], first.key.shape[3], first.value.shape[3], first.scale)
    if any((s.key.shape[1], s.key.shape[3], s.value.shape[3], s.scale) != shape for s in structures):
        raise ReleaseError("Rows of different layers cannot be batched.")
    longest = max(s.key.shape[2] for s in structures)
    longest += -longest % ROWS_MULTIPLE
    padded = [s.padded(longest) for s in structures]
    if len(padded) == 1:
        return padded[0]
    joined = {name: torch.cat([s.tensors()[name] for s in padded]) for name in first.tensors()}
    return RowsStructure(**joined, scale=first.scale)
