from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn.errors import DPXAttnError
from hf_dp_xattn.privacy.clipping import clip_factor, verify_clipped
from hf_dp_xattn.privacy.units import NeighboringRelation, sensitivity_factor

vectors = st.lists(st.integers(-(2**38), 2**38), min_size=1, max_size=30)


def clip(vector: list[int], bound: int) -> list[int]:
    x = torch.tensor(vector, dtype=torch.float64)
    factor = clip_factor(x.square().sum(), bound)
    return [int(v) for v in torch.trunc(x * factor).tolist()]


@given(vectors, st.integers(1, 2**35))
@settings(max_examples=500, deadline=None)
def test_clipped_norm_is_within_the_bound_exactly(vector: list[int], bound: int) -> None:
    assert sum(v * v for v in clip(vector, bound)) <= bound * bound


@given(vectors, vectors, st.integers(1, 2**35))
@settings(max_examples=300, deadline=None)
def test_replacing_one_unit_moves_the_sum_by_at_most_twice_the_bound(
    a: list[int], b: list[int], bound: int
) -> None:
    n = max(len(a), len(b))
    x, y = clip(a + [0] * (n - len(a)), bound), clip(b + [0] * (n - len(b)), bound)
    factor = sensitivity_factor(NeighboringRelation.REPLACE_ONE)
    assert sum((s - t) ** 2 for s, t in zip(x, y, strict=True)) <= (factor * bound) ** 2


def test_the_bound_on_replacement_is_attained() -> None:
    """Power: with a factor of 1 in place of 2 the property above would be false."""
    bound = 2**30
    x, y = clip([2**38], bound)[0], clip([-(2**38)], bound)[0]
    assert abs(x - y) > 1.99 * bound > bound


def test_round_to_nearest_would_break_the_bound() -> None:
    """Power: rounding to nearest instead of towards zero leaves the ball, and the exact check notices."""
    bound = 10
    x = torch.full((1000,), 10.0, dtype=torch.float64)
    nearest = torch.ceil(x * clip_factor(x.square().sum(), bound))
    assert int(nearest.square().sum()) > bound**2
    with pytest.raises(DPXAttnError, match="exceeds its bound"):
        verify_clipped(nearest.square().sum(), bound)


def test_small_vectors_are_left_alone() -> None:
    assert clip([3, -4], 1000) == [3, -4]
