"""Which K of N public texts may answer: clusters with a medoid each, by the expected cosine of the answer."""

from __future__ import annotations

import math

import torch

_ROUNDS = 5
_TEXTS, _PER_MEDOID = 4096, 4
_MOVED, _TRIED = 64, 64  # levels up to this size are searched further, by so many candidates at a time
_BLOCK = 2**25  # entries of a block of scores


def nearest_of(units: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """[n] int64: the index of the entry with the largest cosine to each unit; both [., p] of length 1."""
    return torch.cat(
        [(part @ entries.mT).argmax(1) for part in units.split(max(1, _BLOCK // max(1, len(entries))))]
    )


def medoids(
    codes: torch.Tensor, weights: torch.Tensor, size: int, epsilon: float, seed: int = 0
) -> torch.Tensor:
    """K texts that answer well at epsilon: a local maximum of the expected cosine between a unit and its answer.

    A unit of cluster k is answered by its medoid with odds e^epsilon to each other one, so the medoid m_k adds
    m_k . (e^epsilon S_k + S - S_k) / W, S_k the sum of the cluster's codes and S of all: a medoid leans towards the middle of all units
    where answers are seldom true.

    Args:
        codes: [N, p], of length 1. weights: [N], how often each text stands in public contexts; 0: it may not answer. size: K.

    Returns:
        [K] int64, rising.
    """
    # of many texts the heaviest are enough to find few medoids; of those that weigh about the same, any
    loose = weights * (1.0 + 0.5 * torch.rand(len(weights), generator=torch.Generator().manual_seed(seed)))
    kept = loose.topk(min(len(weights), max(_TEXTS, _PER_MEDOID * size))).indices
    kept = kept[weights[kept] > 0].sort().values
    if size >= len(kept):
        return kept[:size]
    return kept[_medoids(codes[kept], weights[kept], size, epsilon, seed)]


def _medoids(
    codes: torch.Tensor, weights: torch.Tensor, size: int, epsilon: float, seed: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    odds = math.exp(min(epsilon, 30.0))
    chosen = _settled(codes, weights, _seeds(codes, weights, size, generator), odds)
    if size <= _MOVED:
        chosen = _settled(codes, weights, _moved(codes, weights, chosen, generator), odds)
    chosen = torch.unique(chosen)
    if len(chosen) < size:  # a medoid stood twice: fill up with texts that are served worst
        far = (codes * codes[chosen][nearest_of(codes, codes[chosen])]).sum(1)
        far[chosen] = math.inf
        chosen = torch.cat([chosen, torch.argsort(far, stable=True)[: size - len(chosen)]])
    return chosen.sort().values


def _settled(codes: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, odds: float) -> torch.Tensor:
    """Lloyd's rounds: clusters of the medoids, then the best medoid of each cluster."""
    size, weighted = len(chosen), codes * weights[:, None]
    whole = weighted.sum(0)
    for _ in range(_ROUNDS):
        cells = nearest_of(codes, codes[chosen])
        sums = torch.zeros(size, codes.shape[1]).index_add_(0, cells, weighted)
        gain = (codes * ((odds - 1.0) * sums + whole)[cells]).sum(1)  # as the medoid of its own cluster
        top = torch.full((size,), -math.inf).scatter_reduce_(0, cells, gain, "amax")
        at = (gain == top[cells]).nonzero().squeeze(1)
        best = torch.full((size,), len(codes)).scatter_reduce_(0, cells[at], at, "amin")
        best = torch.where(best < len(codes), best, chosen)  # a cluster without texts keeps its medoid
        if torch.equal(best, chosen):
            break
        chosen = best
    return chosen


def _moved(
    codes: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """The medoid that is missed least goes to where one is missed most, as long as that helps."""
    chosen = chosen.clone()
    for _ in range(_MOVED // 2):
        first, cells = (codes @ codes[chosen].mT).topk(2, dim=1)
        loss = torch.zeros(len(chosen)).index_add_(0, cells[:, 0], weights * (first[:, 0] - first[:, 1]))
        far = ((1.0 - first[:, 0]).clamp_min(0.0) + 1e-7) * weights
        tried = torch.multinomial(far, min(_TRIED, len(codes)), generator=generator)
        gain = (weights[:, None] * (codes @ codes[tried].mT - first[:, :1]).clamp_min(0.0)).sum(0)
        if not float(gain.max()) > float(loss.min()):
            break
        chosen[int(loss.argmin())] = tried[int(gain.argmax())]
    return chosen


def _seeds(codes: torch.Tensor, weights: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """First medoids, k-means++ in batches: drawn in proportion to weight and squared distance to those that are there."""
    chosen = torch.multinomial(weights, max(1, size // 8), generator=generator)
    while len(chosen) < size:
        near = codes[chosen]
        far = 1.0 - torch.cat([(part @ near.mT).amax(1) for part in codes.split(max(1, _BLOCK // len(near)))])
        far = (far.clamp_min(0.0) + 1e-7) * weights
        far[chosen] = 0.0
        wanted = min(max(1, size // 8), size - len(chosen))
        chosen = torch.cat([chosen, torch.multinomial(far, wanted, generator=generator)])
    return chosen
