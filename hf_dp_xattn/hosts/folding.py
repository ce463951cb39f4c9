"""Rows that a layer reads at every step, folded into its query and output projections: two products in the place of four.

With W_q, W_o the projections' weights, K_h and V_h the keys and values of R rows in head h, and b their log weights,

    out = sum_h softmax(scale x W_q,h^T K_h^T + b) V_h W_o,h^T + bias = sum_h softmax(x A_h + b) U_h + bias,
    A_h = scale W_q,h^T K_h^T  [C, R],    U_h = V_h W_o,h^T  [R, C'].

Released rows are the same at every step of a picture, so A and U are made once. A query then costs H R (C + C') multiplications in place of
I (C + C' + 2 R), I the width of all heads together: less where the rows of all heads are fewer than the layer is wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..mechanisms.rows_structure import RowsStructure

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

WORTHWHILE = (
    0.9  # of the multiplications: the softmax reads its logits from memory, where a fused attention does not
)
STEPS = 4  # within so many of them folding must have paid


@dataclass(frozen=True)
class FoldedRows:
    """key [B, C, H R], value [B, H R, C'], bias [B, 1, H R] (-inf for padding), out_bias [C'] or [1] of zero. All of it is
    post-processing of a release, or public."""

    heads: int
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    out_bias: torch.Tensor

    def attend(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, m, C] -> [B, m, C'], the output projection's."""
        logits = torch.baddbmm(self.bias, hidden, self.key)
        weights = logits.unflatten(-1, (self.heads, -1)).softmax(-1).flatten(-2)
        return torch.baddbmm(self.out_bias, weights, self.value)


def fold(attn: Attention, rows: RowsStructure, queries: int) -> FoldedRows | None:
    """`rows` (one for each element of the batch) folded into a layer that has so many queries; None where that does not pay, or where
    something else than plain matrices stands between the hidden states and the rows (an adapter, a hook, an offloaded weight, a norm).

    Single precision only: in half precision rounding W_q^T K^T would move the logits.
    """
    project, out = attn.to_q, attn.to_out[0]
    if not foldable(attn, rows):
        return None
    assert isinstance(project, nn.Linear) and isinstance(out, nn.Linear)
    batch, heads, count, _ = rows.key.shape
    if not _pays(project.in_features, project.out_features, out.out_features, heads * count, count, queries):
        return None
    key = rows.key * rows.scale
    folded = torch.einsum("hdc,bhrd->bchr", project.weight.unflatten(0, (heads, -1)), key)
    bias = rows.bias.expand(-1, heads, 1, -1)
    if project.bias is not None:
        bias = bias + torch.einsum("hd,bhrd->bhr", project.bias.unflatten(0, (heads, -1)), key).unsqueeze(2)
    value = torch.einsum("chd,bhrd->bhrc", out.weight.unflatten(1, (heads, -1)), rows.value)
    return FoldedRows(
        heads,
        folded.flatten(2).contiguous(),
        value.flatten(1, 2).contiguous(),
        bias.reshape(batch, 1, heads * count).contiguous(),
        rows.key.new_zeros(1) if out.bias is None else out.bias,
    )


def foldable(attn: Attention, rows: RowsStructure) -> bool:
    """Whether nothing but plain matrices in single precision stands between. To be asked at every use: a hook may have come since."""
    plain = _plain(attn.to_q, rows.key) and _plain(attn.to_out[0], rows.key)
    return plain and attn.norm_q is None and not torch.is_autocast_enabled(rows.key.device.type)


def _plain(module: nn.Module, like: torch.Tensor) -> bool:
    return (
        type(module) is nn.Linear
        and module.weight.dtype == like.dtype == torch.float32
        and module.weight.device == like.device
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in module.__dict__
    )


def _pays(channels: int, inner: int, out: int, folded_rows: int, rows: int, queries: int) -> bool:
    now, then = inner * (channels + out + 2 * rows), folded_rows * (channels + out)
    return then <= WORTHWHILE * now and rows * inner * (channels + out) <= STEPS * queries * (now - then)
