"""k-means on public points: Lloyd's algorithm with dead cells moved to the points that are served worst."""

from __future__ import annotations

import torch

from ...errors import ConfigError
from ..progress import QUIET, Progress

POINTS_PER_CELL = 64  # more points than this many per cell do not move the centres noticeably
MINIMUM_PER_CELL = 4
_SEED_ROUNDS = 8
_SEED_POINTS = 16


def assign(points: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest centre and squared distance of each point, [N] and [N]; chunked."""
    cells, distances = [], []
    norms = centers.square().sum(-1)
    for part in points.split(max(1, 2**24 // centers.shape[0])):
        score = torch.addmm(norms, part, centers.mT, alpha=-2.0)
        best, index = score.min(-1)
        cells.append(index)
        distances.append((best + part.square().sum(-1)).clamp_min(0))
    return torch.cat(cells), torch.cat(distances)


def cells_for(points: torch.Tensor, asked: int | None, most: int, *, per_cell: int = MINIMUM_PER_CELL) -> int:
    """How many cells a codebook of points [N, p] gets: no more than `most`, and than leave each of them `per_cell` distinct points; where
    no number is asked for, a power of two that leaves each twice as many."""
    distinct = len(torch.unique(points, dim=0))
    if asked is not None:
        return min(asked, most, distinct // per_cell)
    cells = most
    while cells > 2 and cells * 2 * per_cell > distinct:
        cells //= 2
    return cells


def _seeds(points: torch.Tensor, cells: int, generator: torch.Generator) -> torch.Tensor:
    """First centres: a few at random, the others in rounds, drawn in proportion to their squared distance (k-means++ in batches)."""
    centers = points[torch.randperm(len(points), generator=generator)[: max(1, cells // _SEED_ROUNDS)]]
    while len(centers) < cells:
        distance = assign(points, centers)[1]
        wanted = min(max(1, cells // _SEED_ROUNDS), cells - len(centers), int((distance > 0).sum()))
        if wanted == 0:
            rest = torch.randperm(len(points), generator=generator)[: cells - len(centers)]
            return torch.cat([centers, points[rest]])
        index = torch.multinomial(distance / distance.sum(), wanted, generator=generator)
        centers = torch.cat([centers, points[index]])
    return centers


def kmeans(
    points: torch.Tensor,
    cells: int,
    *,
    rounds: int = 12,
    seed: int = 0,
    per_cell: int = MINIMUM_PER_CELL,
    progress: Progress = QUIET,
) -> torch.Tensor:
    """Centres [cells, p] of points [N, p]; no cell is empty and no two are equal. per_cell: distinct points that are asked for.

    Raises:
        ConfigError: too few distinct points for so many cells.
    """
    if cells < 2:
        raise ConfigError(f"A codebook needs at least 2 cells, got {cells}.")
    points = points.to(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)[: cells * POINTS_PER_CELL]
    points = points[order]
    distinct = torch.unique(points, dim=0)
    if len(distinct) < per_cell * cells:
        raise ConfigError(
            f"{cells} cells need at least {per_cell * cells} distinct public rows (units); there are {len(distinct)}. Give "
            "more public contexts, or ask for fewer anchors."
        )
    sample = distinct[torch.randperm(len(distinct), generator=generator)[: cells * _SEED_POINTS]]
    centers = _seeds(sample, cells, generator)
    for _ in progress.track(range(rounds), "codebook"):
        index, distance = assign(points, centers)
        count = torch.bincount(index, minlength=cells)
        total = torch.zeros_like(centers).index_add_(0, index, points)
        alive = count > 0
        centers[alive] = total[alive] / count[alive].unsqueeze(1)
        dead = int((~alive).sum())
        if dead:
            centers[~alive] = points[distance.topk(dead).indices]
    # a last look: a centre that serves nobody, or repeats another, becomes a point that is served badly
    for _ in range(rounds):
        index, distance = assign(points, centers)
        empty = torch.bincount(index, minlength=cells) == 0
        if not bool(empty.any()):
            break
        centers[empty] = points[distance.topk(int(empty.sum())).indices]
    else:
        raise ConfigError("The public rows are too alike for so many cells: ask for fewer anchors.")
    return centers
