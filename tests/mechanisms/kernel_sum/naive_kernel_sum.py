"""Naive twin of `kernel_sum`: explicit loops, float64, no lattice. What the fast paths are compared with."""

from __future__ import annotations

import itertools
import math

import torch

from hf_dp_xattn.mechanisms.kernel_sum.geometry import MAX_LOG_WEIGHT, HeadGeometry


def naive_taylor(x: list[float], degree: int) -> list[float]:
    """sqrt(1/alpha!) x^alpha, in the order of itertools.combinations_with_replacement."""
    features = []
    for j in range(degree + 1):
        for index in itertools.combinations_with_replacement(range(len(x)), j):
            coefficient = 1.0
            for i in set(index):
                coefficient /= math.sqrt(math.factorial(index.count(i)))
            features.append(coefficient * math.prod(x[i] for i in index))
    return features


def naive_clip_to_ball(x: torch.Tensor, radius: float) -> torch.Tensor:
    norm = float(x.norm())
    return x * min(1.0, radius / norm) if norm > 0 else x


def naive_contribution(
    g: HeadGeometry, degree: int, key: torch.Tensor, value: torch.Tensor
) -> list[torch.Tensor]:
    """One row's contribution per head: [r, dv + 1] each, before joint clipping. key [H, d], value [H, dv]."""
    heads = []
    for h in range(g.heads):
        centred = key[h].double() - g.key_center[h]
        projected = naive_clip_to_ball(g.key_map[h] @ centred, float(g.key_radius[h]))
        log_weight = float(g.weight_map[h] @ centred)
        weight = math.exp(max(-MAX_LOG_WEIGHT, min(MAX_LOG_WEIGHT, log_weight)))
        phi = naive_taylor(projected.tolist(), degree)
        u = [*((value[h].double() - g.value_center[h]).tolist()), float(g.normalizer_weight[h])]
        rows = [[weight * p * float(g.value_scale[h]) * c for c in u] for p in phi]
        heads.append(torch.tensor(rows, dtype=torch.float64))
    return heads


def naive_sum(
    layers: list[HeadGeometry],
    degree: int,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    clip_norm: float,
    units: list[list[int]],
) -> list[list[torch.Tensor]]:
    """Per layer and head: the sum over units of jointly clipped contributions."""
    totals: list[list[torch.Tensor]] | None = None
    for unit in units:
        parts: list[list[torch.Tensor]] | None = None
        for i in unit:
            row = [
                naive_contribution(g, degree, k[:, i], v[:, i])
                for g, k, v in zip(layers, keys, values, strict=True)
            ]
            parts = (
                row
                if parts is None
                else [[a + b for a, b in zip(p, r, strict=True)] for p, r in zip(parts, row, strict=True)]
            )
        norm = math.sqrt(sum(float((m * m).sum()) for layer in parts for m in layer))
        factor = min(1.0, clip_norm / norm)
        scaled = [[m * factor for m in layer] for layer in parts]
        totals = (
            scaled
            if totals is None
            else [[a + b for a, b in zip(t, s, strict=True)] for t, s in zip(totals, scaled, strict=True)]
        )
    return totals


def naive_attend(
    g: HeadGeometry, degree: int, sums: list[torch.Tensor], query: torch.Tensor, floor: list[float]
) -> torch.Tensor:
    """[H, m, d] -> [H, m, dv] from per-head sums [r, dv + 1] in contribution units."""
    out = torch.zeros(g.heads, query.shape[1], g.value_dim, dtype=torch.float64)
    for h in range(g.heads):
        for j in range(query.shape[1]):
            projected = naive_clip_to_ball(
                g.query_map[h] @ (query[h, j].double() - g.query_center[h]), float(g.query_radius[h])
            )
            phi = torch.tensor(naive_taylor(projected.tolist(), degree), dtype=torch.float64)
            result = phi @ sums[h]
            normalizer = float(result[-1] / (g.value_scale[h] * g.normalizer_weight[h]))
            out[h, j] = result[:-1] / g.value_scale[h] / max(normalizer, floor[h]) + g.value_center[h]
    return out
