"""Naive twins of the trees: explicit loops and recursion over Python numbers. What the tensor forms are compared with."""

from __future__ import annotations

import math

import torch

from hf_dp_xattn.mechanisms.kernel_sum.geometry import MAX_LOG_WEIGHT, HeadGeometry

from ..kernel_sum.naive_kernel_sum import naive_clip_to_ball, naive_taylor


class NaiveTree:
    """A segment tree of (low, high) -> sum; without noise."""

    def __init__(self, numbers: list[float]) -> None:
        size = 1
        while size < len(numbers):
            size *= 2
        self.numbers = numbers + [0] * (size - len(numbers))
        self.nodes: dict[tuple[int, int], float] = {}
        self._build(0, size)

    def _build(self, low: int, high: int) -> float:
        if high - low == 1:
            value = self.numbers[low]
        else:
            middle = (low + high) // 2
            value = self._build(low, middle) + self._build(middle, high)
        self.nodes[low, high] = value
        return value

    def cover(self, low: int, high: int, node: tuple[int, int] | None = None) -> list[tuple[int, int]]:
        """The maximal nodes inside [low, high)."""
        a, b = node or (0, len(self.numbers))
        if high <= a or b <= low:
            return []
        if low <= a and b <= high:
            return [(a, b)]
        middle = (a + b) // 2
        return self.cover(low, high, (a, middle)) + self.cover(low, high, (middle, b))

    def query(self, low: int, high: int) -> float:
        return sum(self.nodes[n] for n in self.cover(low, high))


def naive_distance(points: list[list[float]], weights: list[float], y: list[float], power: int) -> float:
    """sum_i w_i sum_j |x_ij - y_j|^power."""
    return sum(
        w * sum(abs(a - b) ** power for a, b in zip(x, y, strict=True))
        for x, w in zip(points, weights, strict=True)
    )


def naive_softmax(points: list[list[float]], weights: list[float], y: list[float], degree: int) -> float:
    """sum_i w_i <P(x_i), P(y)> by way of squared distances, as the paper does."""
    p_y = naive_taylor(y, degree)
    features = [naive_taylor(x, degree) for x in points]
    norms = sum(w * sum(c * c for c in p) for p, w in zip(features, weights, strict=True))
    total = sum(weights)
    return 0.5 * (norms + sum(c * c for c in p_y) * total - naive_distance(features, weights, p_y, 2))


def naive_tree_attention(
    g: HeadGeometry, degree: int, key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, floor: float
) -> torch.Tensor:
    """[H, n, d], [H, n, dv], [H, q, d] -> [H, q, dv]; no noise, nothing clipped but keys, queries and row weights."""
    out = torch.zeros(g.heads, query.shape[1], g.value_dim, dtype=torch.float64)
    for h in range(g.heads):
        radius = float(g.key_radius[h])
        centred = [key[h, i].double() - g.key_center[h] for i in range(key.shape[1])]
        points = [naive_clip_to_ball(g.key_map[h] @ c, radius).tolist() for c in centred]
        row = [
            math.exp(max(-MAX_LOG_WEIGHT, min(MAX_LOG_WEIGHT, float(g.weight_map[h] @ c)))) for c in centred
        ]
        for q in range(query.shape[1]):
            y = g.query_map[h] @ (query[h, q].double() - g.query_center[h])
            y = naive_clip_to_ball(y, float(g.query_radius[h])).tolist()
            normalizer = max(floor * sum(row), naive_softmax(points, row, y, degree))
            for c in range(g.value_dim):
                column = [
                    w * float(v - g.value_center[h, c]) for w, v in zip(row, value[h, :, c], strict=True)
                ]
                out[h, q, c] = naive_softmax(points, column, y, degree) / normalizer + g.value_center[h, c]
    return out
