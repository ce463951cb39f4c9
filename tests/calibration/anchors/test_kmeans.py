"""Codebooks: no empty cell, no repeated cell, close to what is known to be best; too few rows are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn import ConfigError
from hf_dp_xattn.calibration.anchors.kmeans import assign, kmeans


def points(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cells", [2, 5, 33], ids=lambda m: f"m={m}")
@pytest.mark.parametrize("dims", [1, 7], ids=lambda p: f"p={p}")
def test_assign_matches_cdist(cells: int, dims: int) -> None:
    x, c = points(200, dims), points(cells, dims, 1)
    index, distance = assign(x, c)
    naive = torch.cdist(x.double(), c.double()).square()
    torch.testing.assert_close(distance.double(), naive.min(1).values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        naive.gather(1, index[:, None])[:, 0], naive.min(1).values, rtol=1e-3, atol=1e-3
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000), st.integers(1, 5))
def test_no_cell_is_empty_or_repeated(cells: int, seed: int, copies: int) -> None:
    """Even where most points are copies of a few."""
    x = torch.cat([points(5 * cells, 3, seed), points(3, 3, seed + 1).repeat(cells * copies, 1)])
    centers = kmeans(x, cells, rounds=5, seed=seed)
    assert len(torch.unique(centers, dim=0)) == cells
    assert int(torch.bincount(assign(x, centers)[0], minlength=cells).min()) > 0


def test_finds_well_separated_clusters() -> None:
    truth = 20 * points(6, 4)
    x = truth.repeat(50, 1) + 0.1 * points(300, 4, 2)
    centers = kmeans(x, 12, seed=0)
    assert float(assign(truth, centers)[1].max()) < 1.0


@pytest.mark.parametrize("count", [3, 19], ids=lambda n: f"n={n}")
def test_too_few_rows(count: int) -> None:
    with pytest.raises(ConfigError, match="fewer anchors"):
        kmeans(points(count, 2), 5)


def test_copies_do_not_count() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        kmeans(points(2, 2).repeat(1000, 1), 5)
