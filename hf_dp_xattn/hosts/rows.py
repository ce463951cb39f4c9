"""From rows of a context to one layer's keys and values, through the host's own modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import nn

from ..mechanisms.base import LayerSpec

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


@runtime_checkable
class SelfProjecting(Protocol):
    """A layer that knows its own way from rows [B, n, C] to keys and values [B, H, n, d] (transformers' layers do), and its scale.

    `computes = False`: they are entries of the rows as they are.
    """

    @property
    def scale(self) -> float: ...

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


def split_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, n, heads * d] -> [B, heads, n, d]."""
    return states.view(states.shape[0], -1, heads, states.shape[-1] // heads).transpose(1, 2)


def _home(module: nn.Module, default: torch.device) -> torch.device:
    """Where a projection's input must be; an offloaded module (meta weights) moves its input by itself."""
    device = next(module.parameters()).device
    return default if device.type == "meta" else device


def project(attn: Attention, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, n, d] of context rows [B, n, C]; `to_k` and `to_v` are called as modules, so LoRA takes part."""
    if attn.norm_cross is not None:
        states = attn.norm_encoder_hidden_states(states)
    key = split_heads(attn.to_k(states), attn.heads)
    value = split_heads(attn.to_v(states), attn.heads)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return key, value


def in_range(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as the mechanism takes them: in its dtype, an overflow at the end of the range, and 0 for NaN (an overflow less another).

    What a cast, an encoder or a projection makes of finite private rows may overflow. A refusal would tell such a context from its
    neighbour for certain; this is one more function of each number alone, and what is far outside is clipped anyway.
    """
    return torch.nan_to_num(numbers.to(dtype), nan=0.0)


def project_batch(attn: Attention, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, n, d] of rows [B, n, C], where the layer's weights are; in these weights' precision, since they outlive a
    region of autocast that they may be made in."""
    states = rows.to(_home(attn.to_k, rows.device))
    with torch.autocast(states.device.type, enabled=False):
        return attn.project(states) if isinstance(attn, SelfProjecting) else project(attn, states)


def project_rows(attn: Attention, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`project_batch` of one context: keys and values [H, n, d] of rows [n, C]."""
    key, value = project_batch(attn, rows.unsqueeze(0))
    return key[0], value[0]


def project_apart(
    attn: Attention, rows: torch.Tensor, units: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `project_rows`, one unit at a time, each in memory of its own: a product has this unit's rows and public weights as its only data,
    and its shape and alignment, by which a kernel may choose an order of summation, do not tell how many other rows there are.

    units: indices of each unit's rows, together all rows.
    """
    if not getattr(attn, "computes", True):
        return project_rows(attn, rows)
    keys, values = zip(*(project_rows(attn, rows[unit.to(rows.device)]) for unit in units), strict=True)
    back = torch.cat(list(units)).argsort().to(keys[0].device)
    return torch.cat(keys, dim=1)[:, back], torch.cat(values, dim=1)[:, back]


@runtime_checkable
class SelfDescribing(Protocol):
    """A layer that states its own shapes, because no matrix describes how its keys come about (rotary embeddings)."""

    def spec(self) -> LayerSpec: ...


@torch.no_grad()
def effective_weight(module: nn.Module, heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[H, d, channels] float32 CPU: the linear map that a projection applies, with its adapters."""
    if type(module) is nn.Linear and module.weight.device.type != "meta":
        weight = module.weight.detach()
    else:
        base: Any = getattr(module, "base_layer", module)
        device = _home(module, torch.device("cpu"))
        identity = torch.eye(base.in_features, dtype=dtype, device=device).unsqueeze(0)
        weight = (module(identity) - module(torch.zeros_like(identity[:, :1])))[0].mT
    weight = weight.to("cpu", torch.float32)
    return weight.reshape(heads, -1, weight.shape[-1])


def layer_specs(layers: dict[str, Attention], dtype: torch.dtype) -> list[LayerSpec]:
    """Public shapes and weights of the layers, for `prepare_release` and calibration."""
    specs = []
    for name, attn in layers.items():
        if isinstance(attn, SelfDescribing):
            specs.append(attn.spec())
            continue
        head_dim = attn.inner_dim // attn.heads
        specs.append(
            LayerSpec(
                name=name,
                heads=attn.heads,
                key_dim=head_dim,
                value_dim=head_dim,
                scale=attn.scale,
                query_weight=effective_weight(attn.to_q, attn.heads, dtype),
                key_weight=effective_weight(attn.to_k, attn.heads, dtype),
            )
        )
    return specs
