"""Merging two softmaxes over disjoint rows by their log-sum-exps (exact, up to rounding)."""

from __future__ import annotations

import torch


def exact_partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention over some rows, with its log-sum-exp.

    Args:
        query: [B, H, m, d].
        key, value: [B or 1, H, n, d], [B or 1, H, n, dv].
        scale: multiplies the dot products.
        bias: broadcastable to [B, H, m, n], added to the logits (-inf hides a row).
        softcap: logits are capped by softcap tanh(logit / softcap) before the bias, as Gemma's attention does.

    Returns:
        (out [B, H, m, dv], lse [B, H, m]) in float32 or wider; rows that are hidden altogether give out = 0, lse = -inf.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(wide) * scale) @ key.to(wide).mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.to(wide)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1))
    return weights @ value.to(wide), lse


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of rows: out [..., dv], lse [...]."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a = torch.exp(lse_a - lse).unsqueeze(-1)
    weight_b = torch.exp(lse_b - lse).unsqueeze(-1)
    return out_a * weight_a + out_b * weight_b, lse
