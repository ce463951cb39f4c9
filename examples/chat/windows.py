"""Parallel context windows for the training of a Llama model: segments that see the head and themselves, turns that see everything.

Padding costs attention only: all else runs on the flat list of real tokens. What a turn sees of the prefix and of its own
conversation stands under one softmax, so many conversations share one prefix without copies of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

KV = tuple[Tensor, Tensor]  # keys after RoPE and values, [B, H_kv, n, d]


@dataclass(frozen=True)
class Packed:
    """Sequences [B, T] and which of their tokens are real (bool [B, T], a prefix of every row)."""

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, sequences: list[list[int]]) -> Packed:
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        lengths = torch.tensor([len(s) for s in sequences])
        return cls(ids, torch.arange(longest) < lengths.unsqueeze(1))


def _attend(query: Tensor, own: KV, prefix: KV | None, prefix_mask: Tensor | None, groups: int) -> Tensor:
    """Causal attention of B = P * C sequences over themselves and, C by C, over one of P prefixes.

    Args:
        query: [B, H, T, d].
        own: [B, H_kv, T, d] each.
        prefix: [P, H_kv, n, d] each.
        prefix_mask: bool [P, n].
        groups: H / H_kv.

    Returns:
        [B, T, H * d].
    """
    batch, heads, length, width = query.shape
    kv = heads // groups
    query = query.reshape(batch, kv, groups * length, width) * width**-0.5
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (query @ own[0].mT).view(batch, kv, groups, length, length)
    scores = scores.masked_fill(~causal, -math.inf).view(batch, kv, groups * length, length)
    if prefix is None:
        out = scores.softmax(-1) @ own[1]
    else:
        many, rows = prefix[0].shape[0], prefix[0].shape[2]
        share = batch // many

        def by_prefix(x: Tensor) -> Tensor:
            return x.view(many, share, kv, -1, width).transpose(1, 2).reshape(many, kv, -1, width)

        far = by_prefix(query) @ prefix[0].mT
        if prefix_mask is not None:
            far = far.masked_fill(~prefix_mask.view(many, 1, 1, rows), -math.inf)
        far = far.view(many, kv, share, -1, rows).transpose(1, 2).reshape(batch, kv, -1, rows)
        weights = torch.cat([far, scores], -1).softmax(-1)
        near = weights[..., rows:] @ own[1]
        far = weights[..., :rows].view(many, share, kv, -1, rows).transpose(1, 2)
        seen = far.reshape(many, kv, -1, rows) @ prefix[1]
        out = near + seen.view(many, kv, share, -1, width).transpose(1, 2).reshape(near.shape)
    out = out.view(batch, kv, groups, length, width).permute(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads * width)


def run(
    model: LlamaForCausalLM,
    packed: Packed,
    start: int,
    prefix: list[KV] | None = None,
    prefix_mask: Tensor | None = None,
    *,
    keys_only: bool = False,
) -> tuple[Tensor, list[KV]]:
    """Hidden states [tokens, width] of the real tokens, and every layer's keys (after RoPE) and values.

    Positions are start, start + 1, ... in every sequence. keys_only: stop once the last layer's keys are there.
    """
    inner = model.model
    config = model.config
    batch, length = packed.ids.shape
    mask = packed.mask
    position = torch.arange(start, start + length).unsqueeze(0)
    hidden = inner.embed_tokens(packed.ids[mask])
    cos, sin = inner.rotary_emb(hidden, position)
    made: list[KV] = []

    def spread(x: Tensor, heads: int) -> Tensor:
        padded = x.new_zeros(batch, length, x.shape[-1])
        padded[mask] = x
        return padded.view(batch, length, heads, -1).transpose(1, 2)

    for i, layer in enumerate(inner.layers):
        attention = layer.self_attn
        x = layer.input_layernorm(hidden)
        key = spread(attention.k_proj(x), config.num_key_value_heads)
        value = spread(attention.v_proj(x), config.num_key_value_heads)
        query = spread(attention.q_proj(x), config.num_attention_heads)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        made.append((key, value))
        if keys_only and i == len(inner.layers) - 1:
            break
        far = None if prefix is None else prefix[i]
        out = _attend(query, (key, value), far, prefix_mask, attention.num_key_value_groups)
        hidden = hidden + attention.o_proj(out[mask])
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden, made


def encode(model: LlamaForCausalLM, head: Tensor, segments: list[list[list[int]]]) -> tuple[list[KV], Tensor]:
    """Prefixes of P prompts: the head's rows, then those of the segments of each.

    Args:
        head: ids [h].
        segments: for each prompt its segments' ids.

    Returns:
        Keys and values [P, H_kv, h + n, d] of every layer, n the most rows of a prompt; bool [P, h + n]: the real rows.
    """
    many = len(segments)
    _, first = run(model, Packed.of([head.tolist()]), 0, keys_only=True)
    packed = Packed.of([s for prompt in segments for s in prompt])
    _, made = run(model, packed, len(head), first, keys_only=True)
    owner = torch.arange(many).repeat_interleave(torch.tensor([len(s) for s in segments]))
    owner = owner.unsqueeze(1).expand_as(packed.mask)[packed.mask]
    counts = owner.bincount(minlength=many)
    place = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    rows = int(counts.max())
    mask = torch.arange(rows) < counts.unsqueeze(1)

    def gather(x: Tensor, heads: Tensor) -> Tensor:
        real = x.transpose(1, 2)[packed.mask]
        out = real.new_zeros(many, rows, *real.shape[1:])
        out[owner, place] = real
        return torch.cat([heads.expand(many, -1, -1, -1), out.transpose(1, 2)], 2)

    prefix = [(gather(k, hk), gather(v, hv)) for (k, v), (hk, hv) in zip(made, first, strict=True)]
    return prefix, torch.cat([mask.new_ones(many, len(head)), mask], 1)


def turn_loss(
    model: LlamaForCausalLM,
    prefix: list[KV],
    prefix_mask: Tensor,
    turns: Packed,
    targets: Tensor,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every target and whether it is the likeliest token, for targets (ids [B, T], -100: none)."""
    hidden, _ = run(model, turns, start, prefix, prefix_mask)
    wanted = targets[turns.mask]
    keep = wanted >= 0
    logits = model.lm_head(model.model.norm(hidden[keep]))
    losses = nn.functional.cross_entropy(logits, wanted[keep], reduction="none")
    return losses, logits.argmax(-1) == wanted[keep]
