"""Strict checks: errors are of the caller's class and name the artefact and the part; a dimension's name means one size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_dp_xattn.artefacts.checks import Checks
from hf_dp_xattn.errors import ConfigError, DPXAttnError, ReleaseError

CHECKS = Checks("box", ReleaseError, "pack again")


@pytest.mark.parametrize("error", [ConfigError, ReleaseError])
def test_errors_are_of_the_callers_class_and_name_the_part(error: type[DPXAttnError]) -> None:
    with pytest.raises(error, match=r"box's parts .*\(the lid is 3\).*or pack again\."):
        Checks("box", error, "pack again").integer(3, "the lid", low=4)


@pytest.mark.parametrize("values", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {}, None, [], "ab"])
def test_keys_are_all_there_and_known(values: Any) -> None:
    CHECKS.keys({"a": 1, "b": 2}, {"a", "b"}, "the box")
    with pytest.raises(ReleaseError, match="the box"):
        CHECKS.keys(values, {"a", "b"}, "the box")


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, 0.5, 3, torch.ones(())])
def test_numbers_in_range(value: Any) -> None:
    assert CHECKS.number(1, "x", low=1, high=2) == 1.0
    with pytest.raises(ReleaseError):
        CHECKS.number(value, "x", low=1, high=2)


@pytest.mark.parametrize("value", [True, "1", None, 1.0, 0, -1])
def test_integers(value: Any) -> None:
    assert CHECKS.integer(1, "x") == 1
    with pytest.raises(ReleaseError):
        CHECKS.integer(value, "x")


@given(first=st.lists(st.integers(0, 3), max_size=3), second=st.lists(st.integers(0, 3), max_size=3))
def test_a_dimensions_name_means_one_size(first: list[int], second: list[int]) -> None:
    """Within one tensor and across all; what the first tensor has is what the others must have."""
    names = ["K", "L", "K"]
    sizes = CHECKS.sizes(L=2)
    met: dict[str, int] = {"L": 2}
    for shape in (first, second):
        dims = names[: len(shape)]
        fits = all(met.setdefault(n, size) == size for n, size in zip(dims, shape, strict=True))
        if not fits:
            with pytest.raises(ReleaseError, match="has shape"):
                sizes.fit("x", torch.zeros(shape), *dims)
            return
        sizes.fit("x", torch.zeros(shape), *dims)
    assert all(sizes[n] == size for n, size in met.items())


def test_ranks_and_sizes_by_number() -> None:
    sizes = CHECKS.sizes()
    sizes.fit("x", torch.zeros(2, 3), 2, "K")
    for shape, dims in (((2, 3), ("K",)), ((2,), (3,)), ((2, 3), ("K", "K", 1))):
        with pytest.raises(ReleaseError, match="has shape"):
            sizes.fit("x", torch.zeros(shape), *dims)


def test_what_is_not_finite_or_no_float() -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ReleaseError, match="NaN"):
            CHECKS.sizes().fit("x", torch.tensor([value]), "K")
    CHECKS.sizes().fit("x", torch.tensor([1]), "K")
    with pytest.raises(ReleaseError, match="no floats"):
        CHECKS.sizes().fit("x", torch.tensor([1]), "K", floats=True)
