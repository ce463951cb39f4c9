"""Two neighbouring contexts that a mechanism tells apart as well as it may: canaries, made of public parameters alone.

The canary unit stands beside a bystander, which is the same in both contexts; for unit="context" it is all there is. Candidates are tried,
and the pair whose contributions are furthest apart is kept. A pair that is further apart than one neighbouring step may be is a
broken sensitivity, whatever the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..mechanisms.anchors.anchors import PreparedAnchors
from ..mechanisms.anchors.plan import AnchorPlan
from ..mechanisms.dptree.dptree import PreparedDPTree
from ..mechanisms.inputs import LayerRows, count_rows
from ..mechanisms.kernel_sum.contributions import LayerEncoder
from ..mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from ..mechanisms.library.library import FromLibrary
from ..privacy.units import NeighboringRelation, Unit
from .laws import Context, Law, Views

CANDIDATES = 48
_UNIT_ROWS = 3  # of a canary that is a group or a whole context
_ENTRIES = 2**25  # of all candidates' sums together
_FAR = 1e4  # of a value, in units of its declared range: what is clipped anyway


@dataclass(frozen=True, eq=False)
class Neighbours:
    """one, other: contexts that differ in one unit. gap: their distance as a share of what one unit may change; largest: the largest
    that was found among `tried` pairs."""

    one: Context
    other: Context
    views: Views
    gap: float
    tried: int


def worst_neighbours(law: Law, config: DPXAttnConfig, seed: int = 0) -> Neighbours:
    """The pair that is furthest apart among some dozens.

    Raises:
        ConfigError: the relation has no neighbour that could be released (a whole context that is added or removed).
    """
    remove = config.neighboring != NeighboringRelation.REPLACE_ONE.value
    if remove and config.unit == Unit.CONTEXT.value:
        raise ConfigError(
            "A context that is not there is not released: this pair of neighbours cannot be tried."
        )
    generator = torch.Generator().manual_seed(seed)
    units = _units(law, 1 if config.unit == "row" else _UNIT_ROWS, generator)
    contexts = [_context(law, config, unit) for unit in units]
    if remove:
        contexts.insert(0, _context(law, config, None))
    views = law.views(contexts)
    pairs = [(0, j) for j in range(1, len(contexts))] if remove else _pairs(len(contexts))
    i, j = max(pairs, key=lambda pair: views.gap(*pair))
    pair = contexts[i], contexts[j]
    return Neighbours(*pair, law.views(pair), views.gap(i, j), len(pairs))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i)]


def _units(law: Law, rows: int, generator: torch.Generator) -> list[Context]:
    prepared = law.prepared
    if isinstance(prepared, PreparedAnchors):
        return [Context(unit) for unit in _rows(prepared.plan, rows, generator)]
    if isinstance(prepared, FromLibrary):
        return [Context(unit) for unit in _codes(prepared, generator)]
    # trees: keys away from the centre fill the moments of first and second order as well
    reaches = (0.0, 1.0) if isinstance(prepared, PreparedDPTree) else (0.0,)
    encoders = _encoders(law)
    assert isinstance(prepared, (PreparedDPTree, PreparedKernelSum))
    size = prepared.size if isinstance(prepared, PreparedDPTree) else sum(e.size for e in encoders)
    return [Context(unit) for unit in _keys_and_values(encoders, rows, size, reaches)]


def _encoders(law: Law) -> Sequence[LayerEncoder]:
    if not isinstance(law.prepared, (PreparedDPTree, PreparedKernelSum)):
        raise ConfigError(f"No canaries are known for {type(law.prepared).__name__}.")
    return law.prepared.encoders


def _rows(plan: AnchorPlan, rows: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Units [rows, C]: corners of the public box, along the directions that the public map stretches most and its opposite ones."""
    center, reach = plan.center.double(), plan.reach.double()
    directions = torch.linalg.svd(plan.matrix.double() * reach, full_matrices=False).Vh[: CANDIDATES // 4]
    corners = [center + sign * reach * d.sign() for d in directions for sign in (1.0, -1.0)]
    random = torch.randn(CANDIDATES // 2, len(center), generator=generator, dtype=torch.float64)
    corners += [center + reach * r for r in random]
    return [c.expand(rows, -1).float() for c in corners]


def _codes(prepared: FromLibrary, generator: torch.Generator) -> list[torch.Tensor]:
    """Codes [answers, C] of one unit: far out in random directions of the public box."""
    center = prepared.shelves[0].lattice.map.center
    found = torch.randn(CANDIDATES, prepared.answers, len(center), generator=generator, dtype=torch.float64)
    return [(center + d.sign() * _FAR).float() for d in found]


def _keys_and_values(
    encoders: Sequence[LayerEncoder], rows: int, size: int, reaches: Sequence[float]
) -> list[LayerRows]:
    """A value far out on one channel of one head of one layer; keys at their public centre (so that one feature carries all), or away from
    it, in parts `reaches` of their public range. size: numbers of one context's sums."""
    each = 4 * len(reaches)
    most = max(each, min(CANDIDATES, _ENTRIES // size))
    units = []
    every = max(1, -(-len(encoders) * each // most))
    for at in range(0, len(encoders), every):
        for channel in (0, encoders[at].geometry.value_dim - 1):
            for reach, sign in itertools.product(reaches, (1.0, -1.0)):
                keys, values = [], []
                for i, encoder in enumerate(encoders):
                    g = encoder.geometry
                    away = reach * g.key_range[:, None] * g.key_map[:, 0].sign()
                    keys.append((g.key_center + away).unsqueeze(1).expand(-1, rows, -1).clone())
                    value = g.value_center.unsqueeze(1).expand(-1, rows, -1).clone()
                    if i == at:
                        value[0, :, channel] += sign * _FAR / float(g.value_scale[0])
                    values.append(value)
                units.append(LayerRows(keys, values))
    return units


def _context(law: Law, config: DPXAttnConfig, unit: Context | None) -> Context:
    """The unit and a bystander; None: the bystander alone."""
    alone = config.unit == Unit.CONTEXT.value
    prepared = law.prepared
    if isinstance(prepared, (PreparedAnchors, FromLibrary)):
        bystander = _center(prepared).float().unsqueeze(0)
        parts = [unit.rows] if unit is not None else []
        rows = torch.cat(parts if alone else [bystander, *parts])
        count = len(rows)
        whole = Context(rows)
    else:
        whole = _beside(_encoders(law), unit, alone)
        count = count_rows(whole.rows)
    if config.unit != Unit.GROUP.value:
        return whole
    groups = torch.ones(count, dtype=torch.int64)
    groups[0] = 0
    return Context(whole.rows, groups)


def _center(prepared: PreparedAnchors | FromLibrary) -> torch.Tensor:
    return (
        prepared.plan.center
        if isinstance(prepared, PreparedAnchors)
        else prepared.shelves[0].lattice.map.center
    )


def _beside(encoders: Sequence[LayerEncoder], unit: Context | None, alone: bool) -> Context:
    keys, values = [], []
    for i, encoder in enumerate(encoders):
        g = encoder.geometry
        parts_k = [] if alone else [g.key_center.unsqueeze(1)]
        parts_v = [] if alone else [g.value_center.unsqueeze(1)]
        if unit is not None:
            parts_k.append(unit.rows.keys[i])
            parts_v.append(unit.rows.values[i])
        keys.append(torch.cat(parts_k, dim=1))
        values.append(torch.cat(parts_v, dim=1))
    return Context(LayerRows(keys, values))
