"""Keys and values whose sums are far apart, made of public parameters alone: canaries for audits of sums over layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..inputs import LayerRows
from .contributions import LayerEncoder

_ENTRIES = 2**25  # of all canaries' sums together
_FAR = 1e4  # of a value, in units of its declared range: what is clipped anyway


def far_apart(
    encoders: Sequence[LayerEncoder], rows: int, reaches: Sequence[float], count: int, size: int
) -> list[LayerRows]:
    """Units with a value far out on one channel of one head of one layer; keys at their public centre (so that one feature carries all), or
    away from it.

    Args:
        encoders: of all layers.
        rows: of each unit.
        reaches: how far keys are from their centre, in parts of their public range.
        count: how many units at most, about.
        size: numbers of one context's sums.
    """
    each = 4 * len(reaches)
    most = max(each, min(count, _ENTRIES // size))
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


def public_centre(encoders: Sequence[LayerEncoder]) -> LayerRows:
    """One row at the public centre of keys and values."""
    geometries = [e.geometry for e in encoders]
    return LayerRows(
        [g.key_center.unsqueeze(1) for g in geometries], [g.value_center.unsqueeze(1) for g in geometries]
    )
