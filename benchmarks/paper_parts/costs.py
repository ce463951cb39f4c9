"""Space, initialisation and query time against n, d and r."""

from __future__ import annotations

from typing import Any

import torch

from hf_dp_xattn.mechanisms.dptree import DPTreeCrossAttention
from hf_dp_xattn.mechanisms.dptree.dptree import PreparedDPTree
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.features import number_of_monomials

from .common import (
    KERNEL,
    MECHANISMS,
    TREE,
    Rows,
    Sizes,
    check_answers,
    config,
    fit,
    median,
    prepare,
    release,
    rows,
    seconds,
)

DIM = 4


def numbers(data: Rows, mechanism: str, bins: int) -> int:
    """How many noised numbers leave."""
    prepared = prepare(data, config(mechanism, 1.0, tree_bins=bins))
    heads, channels = data.key.shape[0], data.value.shape[-1] + 1
    r = number_of_monomials(data.key.shape[-1], 2)
    if mechanism == KERNEL:
        return heads * r * channels
    assert isinstance(prepared, PreparedDPTree)
    leaves = prepared.plan.moments.leaves
    return heads * channels * (3 * (r - 1) * (2 * leaves - 1) + 2)


def count_released(data: Rows, bins: int) -> int:
    """The same for the tree, counted on a release."""
    tree = DPTreeCrossAttention.init(
        data.key, data.value, config(TREE, 1.0, tree_bins=bins), scale=data.scale
    )
    softmax = tree.softmax
    nodes = sum(level.numel() for levels in softmax.distances.distance.levels.values() for level in levels)
    return nodes + softmax.total.numel() + softmax.norms.numel()


def space(sizes: Sizes) -> dict[str, Any]:
    """Numbers released; the tree with as many bins as rows, as the paper has it."""
    largest = max(sizes.bins)
    small = rows(8, DIM, DIM)
    assert count_released(small, 16) == numbers(small, TREE, 16)
    found: dict[str, Any] = {"n": [], "dv": [], "r": []}
    for n in sizes.bins:
        found["n"].append({"x": n, **{m: numbers(rows(2, DIM, DIM), m, n) for m in MECHANISMS}})
    for dv in (4, 8, 16, 32):
        found["dv"].append({"x": dv, **{m: numbers(rows(2, DIM, dv), m, largest) for m in MECHANISMS}})
    for d in sizes.dims:
        data, r = rows(2, d, DIM), number_of_monomials(d, 2)
        found["r"].append({"x": r, "d": d, **{m: numbers(data, m, 64) for m in MECHANISMS}})
    slopes = {
        by: {
            m: fit([p["x"] for p in points[-4:]], [[p[m]] for p in points[-4:]])["slope"] for m in MECHANISMS
        }
        for by, points in found.items()
    }
    return {"points": found, "slopes": slopes, "tree_bins_by_dv": largest, "tree_bins_by_r": 64}


def initialisation(sizes: Sizes) -> dict[str, Any]:
    """Seconds of a release (its public preparation left out)."""
    largest_n = max(sizes.init_rows)

    def point(data: Rows, bins: int) -> dict[str, list[float]]:
        result = {}
        for m in MECHANISMS:
            prepared = prepare(data, config(m, 1.0, tree_bins=bins))
            result[m] = seconds(lambda p=prepared: p.run(LayerRows([data.key], [data.value])), sizes.repeats)  # type: ignore[misc]
        return result

    found = {
        "n": [{"x": n, **point(rows(n, DIM, DIM), 64)} for n in sizes.init_rows],
        "dv": [{"x": dv, **point(rows(largest_n // 4, DIM, dv), 64)} for dv in (4, 8, 16, 32)],
        "r": [
            {"x": number_of_monomials(d, 2), "d": d, **point(rows(largest_n // 4, d, DIM), 64)}
            for d in sizes.dims
        ],
    }
    return _timed(found)


def queries(sizes: Sizes, count: int = 1024) -> dict[str, Any]:
    """Seconds for `count` queries: of the trees themselves (gathers), of what is served of them, of kernel_sum; and exact attention."""
    check = check_answers(rows(200, DIM, DIM))

    def point(data: Rows, bins: int) -> dict[str, list[float]]:
        tree = DPTreeCrossAttention.init(
            data.key, data.value, config(TREE, 1.0, tree_bins=bins), scale=data.scale
        )
        served = {m: release(data, config(m, 1.0, tree_bins=bins)) for m in MECHANISMS}
        query, key, value = data.query, data.key.unsqueeze(0), data.value.unsqueeze(0)
        result = {"trees": seconds(lambda: tree.query(query[0]), sizes.repeats)}
        for m in MECHANISMS:
            result[m] = seconds(lambda s=served[m]: s.attend(query), sizes.repeats)  # type: ignore[misc]
        result["exact"] = seconds(
            lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=data.scale),
            sizes.repeats,
        )
        return result

    found = {
        "n": [{"x": n, **point(rows(n, DIM, DIM, queries=count), min(n, 4096))} for n in sizes.init_rows],
        "dv": [{"x": dv, **point(rows(256, DIM, dv, queries=count), 64)} for dv in (4, 8, 16, 32)],
        "r": [
            {"x": number_of_monomials(d, 2), "d": d, **point(rows(256, d, DIM, queries=count), 64)}
            for d in sizes.dims
        ],
    }
    return {**_timed(found), "queries": count, "relative_errors_checked": check}


def _timed(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Slopes over the upper half of each range, and medians in place of the single times."""
    slopes: dict[str, Any] = {}
    for by, points in found.items():
        upper = points[len(points) // 2 - 1 :] if len(points) > 3 else points
        names = [k for k in points[0] if k not in ("x", "d")]
        slopes[by] = {k: fit([p["x"] for p in upper], [p[k] for p in upper], median) for k in names}
    points_out = {
        by: [{k: v if k in ("x", "d") else median(v) for k, v in p.items()} for p in points]
        for by, points in found.items()
    }
    return {"points": points_out, "slopes": slopes}
