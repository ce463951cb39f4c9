"""`dp_xattn_prefix`: the attention function that the layers of a protected decoder-only model are given.

The user's own tokens are attended exactly and causally, the private prefix through its release, a public head exactly; all under one
softmax, merged by log-sum-exp. The host hands over keys and values of own tokens only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ....errors import ConfigError, ProtectionLostError
from ....mechanisms.merge import exact_partial, merge
from ...tables import LayerTable
from ..generating import ThreadCalls
from ..reading import Probing, group_queries, host_attention, read_partial, served, ungroup

NAME = "dp_xattn_prefix"
LAYER_ATTRIBUTE = "_dp_xattn_prefix_layer"
NO_RELEASE = (
    "The attention function 'dp_xattn_prefix' has no release to read here. It is set by dpx.protect(model, config), not by hand, and a "
    "protected model is called as a whole (model.generate(**release.inputs(input_ids=...)) or model(**release.inputs(...))), not by its "
    "parts."
)


@dataclass(frozen=True)
class Call:
    """What the layers of one forward may read.

    tables: one per layer name; index [B]: each batch element's binding; offset: positions before the first own token; suffix: own
    tokens so far, this forward's included; mask: bool [B, suffix] of those that are no padding, or None; public: inside
    `protected.public()`; queries: where each layer's queries [B, H, m, d] are collected, public ones; H counts key heads.
    biases: what `suffix_bias` made, which is the same in most layers. cache: that the forward was given.
    """

    tables: dict[str, LayerTable]
    index: torch.Tensor
    offset: int = 0
    suffix: int = 0
    mask: torch.Tensor | None = None
    public: bool = False
    queries: dict[str, list[torch.Tensor]] | None = None
    cache: object = None
    biases: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)

    def suffix_bias(self, queries: int, groups: int, device: torch.device) -> torch.Tensor:
        """[B or 1, 1, groups * queries, own]: 0 where a query (the last `queries` of the own tokens) may look, else -inf."""
        key = queries, groups, device
        if key not in self.biases:
            keys = torch.arange(self.suffix, device=device)
            visible = (keys <= keys[self.suffix - queries :, None]).unsqueeze(0)
            if self.mask is not None:
                visible = visible & self.mask.to(device).unsqueeze(1)
            bias = torch.zeros(visible.shape, device=device).masked_fill(~visible, -torch.inf)
            self.biases[key] = bias.repeat(1, groups, 1).unsqueeze(1)
        return self.biases[key]


class Calls(ThreadCalls):
    """See `ThreadCalls`. served: the tables that were made in this thread last, and what for."""

    current: Call | None = None
    served: tuple[object, dict[str, LayerTable]] | None = None


@dataclass
class Seen:
    """What one module handed to its attention function: query [B, Hq, m, d], key [B, H, n, d], value [B, H, n, dv]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    softcap: float | None
    calls: int = 1


@dataclass
class Recording:
    """The layers' queries, keys and values while the host's own attention runs. configs: the host's own, by module.

    judge: is given each module, what it handed over, and what the host's own attention made of it.
    """

    configs: dict[nn.Module, Any]
    seen: dict[nn.Module, Seen] = field(default_factory=dict)
    judge: Callable[[nn.Module, Seen, torch.Tensor], None] | None = None


recording: Probing[Recording] = Probing()
"""While it lasts, this thread's `dp_xattn_prefix` is the host's own attention, and what it is given is kept."""


def dp_xattn_prefix(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """query [B, Hq, m, d], own keys and values [B, H, own, d] -> ([B, m, Hq, dv], None). The host's mask is not looked at.

    *Formal guarantee.* The output is a function of the query, the own tokens, the release and the public head.

    Raises:
        ProtectionLostError: no release is at hand, or the host handed over other keys than those of the own tokens.
        ConfigError: a sliding window would hide a part of the prefix.
    """
    scaling, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    state = recording.now
    if state is not None and module in state.configs:
        before = state.seen.get(module)
        state.seen[module] = Seen(
            query, key, value, scale, softcap, 1 if before is None else before.calls + 1
        )
        original = host_attention(module, state.configs[module]._attn_implementation)
        result: tuple[torch.Tensor, Any] = original(module, query, key, value, attention_mask, **kwargs)
        if state.judge is not None:
            state.judge(module, state.seen.pop(module), result[0])  # of several hundred tokens: not kept
        return result
    layer, call = served(module, LAYER_ATTRIBUTE, NO_RELEASE)
    if call.public:
        original = host_attention(module, layer.config._attn_implementation)
        public: tuple[torch.Tensor, Any] = original(module, query, key, value, attention_mask, **kwargs)
        return public
    batch, query_heads, m, _ = query.shape
    if len(call.index) != batch or key.shape[0] != batch or key.shape[2] != call.suffix or m > call.suffix:
        raise ProtectionLostError(
            f"{layer.name} was given {key.shape[2]} keys for a batch of {key.shape[0]}; the cache of this release says "
            f"{call.suffix} for {len(call.index)}. Pass release.inputs(...) on as it is."
        )
    check_window(kwargs.get("sliding_window"), call.offset + call.suffix)
    heads = key.shape[1]
    grouped = group_queries(query, heads)
    if call.queries is not None:
        call.queries.setdefault(layer.name, []).append(grouped)
    prefix = read_partial(call.tables[layer.name], grouped, call.index, scale, softcap)
    bias = call.suffix_bias(m, query_heads // heads, query.device)
    suffix = exact_partial(grouped, key, value, scale, bias, softcap)
    out = ungroup(merge(*prefix, *suffix)[0].to(query.dtype), query_heads, m)
    return out.transpose(1, 2).contiguous(), None


def check_window(window: int | None, total: int) -> None:
    """Raises ConfigError where `total` positions do not fit a sliding window: a release has no rows that could be left behind."""
    if window is not None and total > window:
        raise ConfigError(
            f"{total} positions (public head, padded prefix, own tokens) do not fit this model's window of {window}: beyond it a layer "
            "would have to forget a part of the prefix, which a release cannot. Shorten the conversation, max_new_tokens or the prefix."
        )


AttentionInterface.register(NAME, dp_xattn_prefix)
