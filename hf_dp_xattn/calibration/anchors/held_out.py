"""Which public contexts nothing is fitted to: some at random, and some whole kinds of contexts.

Private contexts may be of a kind that no public one is. So half of what is held out are whole *kinds*, clusters of contexts by their mean
unit: nothing of such a kind is fitted to. Contexts of one kind are alike, so intervals count kinds, not contexts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import ConfigError
from .kmeans import assign, kmeans
from .slots_fit import PublicContexts

_KINDS = 48  # into which contexts are dealt, at most
_OF_A_KIND = 12
_STOPPING = 64
_CHUNK = 64


@dataclass(frozen=True, eq=False)
class HeldOut:
    """training: what everything is fitted to; stopping: what says when a fit has gone on for long enough; validation: what judges.

    kinds [N] int64, unlike [N] bool: of the validation's contexts, the kind of each, and whether nothing was fitted to that kind.
    """

    training: PublicContexts
    stopping: PublicContexts
    validation: PublicContexts
    kinds: torch.Tensor
    unlike: torch.Tensor


@torch.no_grad()
def kinds_of(contexts: PublicContexts, count: int, seed: int) -> torch.Tensor:
    """[N] int64: clusters of contexts by their mean unit, each channel by its own deviation; where contexts are too alike, each its own."""
    means = []
    for index in torch.arange(len(contexts)).split(_CHUNK):
        mask = contexts.mask[index].unsqueeze(-1)
        units = contexts.units[index].float() * mask
        means.append(units.sum(1) / mask.sum(1).clamp_min(1))
    points = torch.cat(means)
    points = (points - points.mean(0)) / points.std(0).clamp_min(1e-6)
    try:
        return assign(points, kmeans(points, count, seed=seed, per_cell=1))[0]
    except ConfigError:
        return torch.arange(len(points)) % count


def hold_out(contexts: PublicContexts, most: int, seed: int) -> HeldOut:
    """Deals public contexts out.

    Args:
        contexts: all of them.
        most: to be held out for the validation; no more than a sixth of all.
        seed: of the random choice.
    """
    generator = torch.Generator().manual_seed(seed)
    total, held = len(contexts), min(most, len(contexts) // 6)
    wanted = held // 2
    count = max(4, min(_KINDS, total // _OF_A_KIND))
    kinds = kinds_of(contexts, count, seed)
    order = torch.randperm(total, generator=generator)
    lost = torch.zeros(count, dtype=torch.bool)
    sizes = torch.bincount(kinds, minlength=count)
    for kind in torch.randperm(count, generator=generator).tolist():
        if int(sizes[lost].sum()) < wanted and int(sizes[kind]) < total // 4:
            lost[kind] = True
    unlike = lost[kinds[order]]
    rest = order[~unlike]
    like, rest = rest[: held - wanted], rest[held - wanted :]
    stopping = min(_STOPPING, len(rest) // 10)
    judges = torch.cat([like, order[unlike][:wanted]])  # the rest of these kinds takes no part
    return HeldOut(
        contexts.part(rest[stopping:]),
        contexts.part(rest[:stopping]),
        contexts.part(judges),
        kinds[judges],
        torch.arange(len(judges)) >= len(like),
    )
