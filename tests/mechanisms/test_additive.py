"""What a corpus over many processes rests on: exact integers of many units are the sum of those of each batch, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.base import Integers
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.registry import prepare_release

from .anchors.naive_anchors import decoders, plan
from .growing.ways import ANCHORS, KERNEL, SPECS, batch, joined, sketched

KINDS = ("kernel_sum", "sketch", "sum", "histogram", "mixed")


def prepared(kind: str, unit: str) -> Any:
    if kind in ("kernel_sum", "sketch"):
        made = prepare_release(KERNEL.replace(unit=unit), SPECS)
        return sketched(made) if kind == "sketch" else made  # type: ignore[arg-type]
    table = decoders("mixed") if kind == "mixed" else decoders()
    return prepare_anchors(ANCHORS.replace(unit=unit), [plan(kind)], table)


def some(private: Any, rows: torch.Tensor) -> Any:
    if isinstance(private, LayerRows):
        return LayerRows([k[:, rows] for k in private.keys], [v[:, rows] for v in private.values])
    return private[rows]


def added(mechanism: Any, private: Any, groups: torch.Tensor, batches: list[torch.Tensor]) -> Integers:
    parts = [mechanism.exact(some(private, rows), groups[rows]) for rows in batches]
    return tuple(map(sum, zip(*parts, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=6),
    cut=st.integers(1, 5),
)
@settings(max_examples=10, deadline=None)
def test_batches_of_documents_add_up(kind: str, seed: int, sizes: list[int], cut: int) -> None:
    unit = "row" if kind == "mixed" else "group"  # mixed releases rows
    mechanism = prepared(kind, unit)
    assert mechanism.additive
    private = joined([batch(kind, n, seed + i, 10.0 ** (seed % 3 - 1)) for i, n in enumerate(sizes)])
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    units = [torch.nonzero(groups == g)[:, 0] for g in torch.randperm(len(sizes)).tolist()]
    batches = [torch.cat(units[i : i + cut]) for i in range(0, len(units), cut)]
    if unit == "row":
        whole = mechanism.exact(private, None)
        parts = [mechanism.exact(some(private, rows), None) for rows in batches]
        total = tuple(map(sum, zip(*parts, strict=True)))
    else:
        whole, total = mechanism.exact(private, groups), added(mechanism, private, groups, batches)
    assert len(whole) == len(total) and all(map(torch.equal, whole, total))
    assert all(t.dtype == torch.int64 for t in whole)


def test_the_sums_catch_a_document_that_is_cut_in_two() -> None:
    """Power: a unit that falls into two batches is clipped twice."""
    mechanism, private = prepared("histogram", "group"), batch("histogram", 12, 1)
    groups = torch.zeros(12, dtype=torch.int64)
    whole = mechanism.exact(private, groups)
    halves = added(mechanism, private, groups, [torch.arange(6), torch.arange(6, 12)])
    assert not all(map(torch.equal, whole, halves))


def test_answers_are_no_sum() -> None:
    assert not prepared("response", "row").additive
