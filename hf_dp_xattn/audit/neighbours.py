"""Two neighbouring contexts that a mechanism tells apart as well as it may: canaries, made of public parameters alone.

The canary unit stands beside a bystander, which is the same in both contexts; for unit="context" it is all there is. Candidates are tried,
and the pair whose contributions are furthest apart is kept. A pair that is further apart than one neighbouring step may be is a
broken sensitivity, whatever the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.inputs import Private, count_rows, together
from ..privacy.units import NeighboringRelation, Unit
from .laws import Context, Law, Views

CANDIDATES = 48
_UNIT_ROWS = 3  # of a canary that is a group or a whole context


@dataclass(frozen=True, eq=False)
class Neighbours:
    """one, other: contexts that differ in one unit. gap: their distance as a share of what one unit may change; largest: the largest
    that was found among `tried` pairs."""

    one: Context
    other: Context
    views: Views
    gap: float
    tried: int


def worst_neighbours(law: Law, config: DPXAttnConfig) -> Neighbours:
    """The pair that is furthest apart among some dozens.

    Raises:
        ConfigError: the relation has no neighbour that could be released (a whole context that is added or removed).
    """
    remove = config.neighboring != NeighboringRelation.REPLACE_ONE.value
    if remove and config.unit == Unit.CONTEXT.value:
        raise ConfigError(
            "A context that is not there is not released: this pair of neighbours cannot be tried."
        )
    generator = torch.Generator().manual_seed(0)
    prepared = law.prepared
    units = prepared.canaries(CANDIDATES, 1 if config.unit == "row" else _UNIT_ROWS, generator)
    alone = config.unit == Unit.CONTEXT.value
    bystander = [] if alone else [prepared.bystander()]
    contexts = [_context(config, [*bystander, unit]) for unit in units]
    if remove:
        contexts.insert(0, _context(config, bystander))
    views = law.views(contexts)
    pairs = [(0, j) for j in range(1, len(contexts))] if remove else _pairs(len(contexts))
    i, j = max(pairs, key=lambda pair: views.gap(*pair))
    pair = contexts[i], contexts[j]
    return Neighbours(*pair, law.views(pair), views.gap(i, j), len(pairs))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i)]


def _context(config: DPXAttnConfig, units: Sequence[Private]) -> Context:
    """A bystander of one row, if there is one, and a unit."""
    rows = together(units)
    if config.unit != Unit.GROUP.value:
        return Context(rows)
    groups = torch.ones(count_rows(rows), dtype=torch.int64)
    groups[0] = 0
    return Context(rows, groups)
