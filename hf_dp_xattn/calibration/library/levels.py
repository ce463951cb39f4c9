"""Which K of N public texts may answer: clusters with a medoid each, by the expected cosine of the answer."""

from __future__ import annotations

import math

import torch

_ROUNDS = 5
_FEWEST, _TEXTS, _PER_MEDOID, _WELL = 1024, 4096, 4, 12  # how many texts the search for K medoids looks at
MOVES = 8  # rounds of moves
_MOVED, _WORK = 48, 2**34  # clusters moved in one round, products that all rounds may cost
_BLOCK = 2**25  # entries of a block of scores
_TRIES, _SHORT = 6, 64  # searches for a list that is no longer than this: it may well end in a poor maximum


def nearest_of(units: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """[n] int64: the index of the entry with the largest cosine to each unit; both [., p] of length 1."""
    return torch.cat(
        [(part @ entries.mT).argmax(1) for part in units.split(max(1, _BLOCK // max(1, len(entries))))]
    )


def medoids(
    codes: torch.Tensor, weights: torch.Tensor, size: int, epsilon: float, seed: int = 0, moves: int = MOVES
) -> torch.Tensor:
    """K texts that answer well at epsilon: a local maximum of the expected cosine between a unit and its answer.

    A unit of cluster k is answered by its medoid with odds e^epsilon to each other one, so the medoid m_k adds
    m_k . (e^epsilon S_k + S - S_k) / W, S_k the sum of the cluster's codes and S of all: a medoid leans towards the middle of all units
    where answers are seldom true. Clusters are found with free centres, which are moved from where one is missed least to where one is
    missed most; then each centre gives way to a text. Of a short list the best of several searches is taken.

    Args:
        codes: [N, p], of length 1. weights: [N], how often each text stands in public contexts; 0: it may not answer. size: K.
        moves: rounds of moves; fewer are enough to compare sizes.

    Returns:
        [K] int64, rising.
    """
    # of many texts the heaviest are enough to find few medoids; of those that weigh about the same, any
    loose = weights * (1.0 + 0.5 * torch.rand(len(weights), generator=torch.Generator().manual_seed(seed)))
    enough = max(_FEWEST, min(_WELL * size, _TEXTS), _PER_MEDOID * size)
    kept = loose.topk(min(len(weights), enough)).indices
    kept = kept[weights[kept] > 0].sort().values
    if size >= len(kept):
        return kept[:size]
    points, mass = codes[kept], weights[kept]
    seeds = range(seed, seed + (_TRIES if size <= _SHORT else 1))
    tries = [_medoids(points, mass, size, epsilon, s, moves) for s in seeds]
    return kept[
        tries[0] if len(tries) == 1 else max(tries, key=lambda t: _expected(points, mass, t, epsilon))
    ]


def _expected(codes: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, epsilon: float) -> float:
    """The sum of weighted expected cosines between texts and their answers."""
    cosines, odds = codes @ codes[chosen].mT, math.exp(min(epsilon, 30.0))
    likely = (odds - 1.0) * cosines.amax(1) + cosines.sum(1)
    return float((weights * likely).sum() / (odds - 1.0 + len(chosen)))


def _medoids(
    codes: torch.Tensor, weights: torch.Tensor, size: int, epsilon: float, seed: int, moves: int
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    odds = math.exp(min(epsilon, 30.0))
    centres = _moved(codes, weights, codes[_seeds(codes, weights, size, generator)], moves, generator)
    chosen: torch.Tensor = torch.unique(_settled(codes, weights, _members(codes, centres), odds))
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


def _members(codes: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Of each centre that has a cluster: its nearest text there."""
    cells = nearest_of(codes, centres)
    near = (codes * centres[cells]).sum(1)
    top = torch.full((len(centres),), -math.inf).scatter_reduce_(0, cells, near, "amax")
    at = (near == top[cells]).nonzero().squeeze(1)
    best = torch.full((len(centres),), len(codes)).scatter_reduce_(0, cells[at], at, "amin")
    members: torch.Tensor = best[best < len(codes)]
    return members


def _centred(codes: torch.Tensor, weighted: torch.Tensor, centres: torch.Tensor, rounds: int) -> torch.Tensor:
    """Lloyd's rounds with free centres."""
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, nearest_of(codes, centres), weighted)
        centres = torch.where(sums.any(1, keepdim=True), torch.nn.functional.normalize(sums, dim=1), centres)
    return centres


def _moved(
    codes: torch.Tensor, weights: torch.Tensor, centres: torch.Tensor, moves: int, generator: torch.Generator
) -> torch.Tensor:
    """Centres that are missed least go to texts where one is missed most, as long as that helps."""
    weighted, size = codes * weights[:, None], len(centres)
    centres = _centred(codes, weighted, centres, 4)
    rounds = min(moves, _WORK // (codes.numel() * size)) if size > 2 else 0
    best: tuple[float, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    most = max(1, min(size // 8, _MOVED))
    for _ in range(rounds):
        pairs = [(part @ centres.mT).topk(2, dim=1) for part in codes.split(max(1, _BLOCK // size))]
        first, cells = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
        value = float((weights * first[:, 0]).sum())
        if best is not None and value <= best[0]:
            most = max(1, most // 2)
        else:
            best = value, centres, first, cells
        _, centres, first, cells = best
        loss = torch.zeros(size).index_add_(0, cells[:, 0], weights * (first[:, 0] - first[:, 1]))
        far = ((1.0 - first[:, 0]).clamp_min(0.0) + 1e-7) * weights
        tried = torch.multinomial(far, min(4 * most + 8, len(codes)), generator=generator)
        gain = weights[:, None] * (codes @ codes[tried].mT - first[:, :1]).clamp_min(0.0)
        taken: list[int] = []
        for _ in range(most):  # each next one by what it adds to those before
            taken.append(int(gain.sum(0).argmax()))
            gain = (gain - gain[:, taken[-1:]]).clamp_min(0.0)
        centres = centres.clone()
        centres[loss.argsort(stable=True)[:most]] = codes[tried[taken]]
        centres = _centred(codes, weighted, centres, 2)
    return centres if best is None else _centred(codes, weighted, best[1], 4)


def _seeds(codes: torch.Tensor, weights: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """First medoids, k-means++ in batches: drawn in proportion to weight and squared distance to those that are there."""
    chosen = torch.multinomial(weights, 1, generator=generator)
    near = codes @ codes[chosen[0]]
    while len(chosen) < size:
        far = ((1.0 - near).clamp_min(0.0) + 1e-7) * weights
        far[chosen] = 0.0
        wanted = min(max(1, len(chosen) // 4), size - len(chosen))
        drawn = torch.multinomial(far, wanted, generator=generator)
        near = torch.maximum(near, (codes @ codes[drawn].mT).amax(1))
        chosen = torch.cat([chosen, drawn])
    return chosen
