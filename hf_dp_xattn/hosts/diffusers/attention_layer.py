"""Cross-attention of diffusers as a `Layer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...mechanisms.base import LayerSpec
from ..fingerprint import sketch_of
from ..layer import Layer, linear_map

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, n, heads * d] -> [B, heads, n, d]."""
    return states.view(states.shape[0], -1, heads, states.shape[-1] // heads).transpose(1, 2)


def project(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, n, d] of context rows [B, n, C]; `to_k` and `to_v` are called as modules, so LoRA takes part."""
    if attn.norm_cross is not None:
        states = attn.norm_encoder_hidden_states(states)
    key = split_heads(attn.to_k(states), attn.heads)
    value = split_heads(attn.to_v(states), attn.heads)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return key, value


class AttentionLayer(Layer):
    """Keys and values have heads of one width. module: the `Attention`, whose projections may be replaced (by an adapter's, say)."""

    module: Any

    def __init__(self, name: str, attn: Attention) -> None:
        self.name, self.module = name, attn
        self.heads = attn.heads
        self.key_dim = self.value_dim = attn.inner_dim // attn.heads
        self.scale, self.softcap, self.channels = attn.scale, None, attn.cross_attention_dim

    def parts(self) -> list[nn.Module]:
        return [self.module.to_k, self.module.to_v]

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return project(self.module, rows)

    def sketch(self, dtype: torch.dtype) -> torch.Tensor:
        """See `fingerprint.Sketching`."""
        return sketch_of(self.parts(), dtype)

    def spec(self, dtype: torch.dtype) -> LayerSpec:
        query, key = (self._weight(part, dtype) for part in (self.module.to_q, self.module.to_k))
        return LayerSpec(self.name, self.heads, self.key_dim, self.value_dim, self.scale, query, key)

    def _weight(self, part: Any, dtype: torch.dtype) -> torch.Tensor:
        """[H, d, channels] float32 CPU."""
        if type(part) is nn.Linear and part.weight.device.type != "meta":
            weight = part.weight.detach().to("cpu", torch.float32)
        else:
            weight = linear_map(part, part, getattr(part, "base_layer", part).in_features, dtype)
        return weight.reshape(self.heads, -1, weight.shape[-1])

    def output_gain(self) -> torch.Tensor:
        projection: Any = getattr(self.module.to_out[0], "base_layer", self.module.to_out[0])
        weight = projection.weight.detach().to("cpu", torch.float64)
        per_head = weight.reshape(weight.shape[0], self.heads, -1)
        return per_head.square().sum((0, 2)) / per_head.shape[2]
