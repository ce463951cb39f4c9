"""The plan for each epsilon: how many texts may answer and how many count as near, by public units that were held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...privacy.rank_response import RankResponse
from .levels import medoids
from .text_library import LibraryQuality, spread

_NEAR = tuple(2**i for i in range(8))
_SIZES = tuple(2**i for i in range(1, 13))
_UNITS = 2000  # held-out units that are looked at


@dataclass(frozen=True, eq=False)
class PublicUnits:
    """codes [n, p] of length 1; context [n]: which context each is of."""

    codes: torch.Tensor
    context: torch.Tensor

    def some(self, seed: int = 0) -> PublicUnits:
        order = torch.randperm(len(self.codes), generator=torch.Generator().manual_seed(seed))[:_UNITS]
        return PublicUnits(self.codes[order], self.context[order])


def expected(similarity: torch.Tensor, response: RankResponse) -> torch.Tensor:
    """[n]: each unit's expected cosine. similarity [n, K]: to each entry, in any order."""
    near = similarity.topk(response.near, dim=1).values
    total, done = torch.zeros(len(similarity)), 0
    last = response.weights[-1] / response.total
    for count, weight in zip(response.counts[:-1], response.weights[:-1], strict=True):
        total += (weight / response.total - last) * near[:, done : done + count].sum(1)
        done += count
    return total + last * similarity.sum(1)


@dataclass(frozen=True)
class Choice:
    """K (0: all texts), t, and how well they did."""

    size: int
    near: int
    quality: LibraryQuality


def entries_of(
    choice_size: int, codes: torch.Tensor, weights: torch.Tensor, epsilon: float, seed: int
) -> torch.Tensor:
    """[K] int64, rising: the texts that may answer. choice_size 0: all of them."""
    size = len(codes) if choice_size == 0 else min(choice_size, len(codes))
    return torch.arange(size) if size == len(codes) else medoids(codes, weights, size, epsilon, seed)


def choose(
    codes: torch.Tensor, weights: torch.Tensor, held: PublicUnits, epsilon: float, seed: int = 0
) -> Choice:
    """The best size and near size at epsilon for units of contexts that the library does not hold.

    Args:
        codes, weights: of the texts that may answer. held: public units of other contexts.

    Raises:
        ConfigError: fewer than two texts.
    """
    if len(codes) < 2:
        raise ConfigError("A library needs at least 2 distinct public texts.")
    held = held.some(seed)
    best: tuple[float, int, int, torch.Tensor] | None = None
    for size in (*(s for s in _SIZES if s < len(codes)), 0):
        similarity = held.codes @ codes[entries_of(size, codes, weights, epsilon, seed)].mT
        for near in (t for t in _NEAR if t < similarity.shape[1]):
            try:
                response = RankResponse.of(epsilon, similarity.shape[1], near)
            except ConfigError:
                continue  # weights beyond 2^48
            found = expected(similarity, response)
            if best is None or float(found.mean()) > best[0]:
                best = float(found.mean()), size, near, found
    assert best is not None  # size 2 and near 1 always fit
    distortion = _by_context(1.0 - best[3], held.context)
    exact = 1.0 - float(similarity.amax(1).mean())  # of the last size, which is all of them
    return Choice(best[1], best[2], LibraryQuality(*spread(distortion), exact, len(distortion)))


def _by_context(values: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    _, at, count = torch.unique(context, return_inverse=True, return_counts=True)
    total: torch.Tensor = torch.zeros(len(count)).index_add_(0, at, values)
    mean: torch.Tensor = total / count
    return mean
