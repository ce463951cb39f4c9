"""A host's cross-attention layers, as a calibration reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..calibration.anchors.objective import LayerProbe
from .rows import SelfProjecting, project_batch


def row_flops(layers: dict[str, Any]) -> float:
    """Multiplications and additions of one row's keys and values in all layers."""
    return sum(4.0 * a.cross_attention_dim * a.inner_dim for a in layers.values())


def layer_probes(
    layers: dict[str, Any], queries: Sequence[torch.Tensor], gains: Sequence[torch.Tensor]
) -> list[LayerProbe]:
    """The layers' own projections, their public queries [H, m, d] and gains [H]."""
    return [
        LayerProbe(partial(_project, layer), _scale(layer), query.float(), gain)
        for layer, query, gain in zip(layers.values(), queries, gains, strict=True)
    ]


def _project(layer: Any, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return project_batch(layer, rows.to(next(layer.to_k.parameters()).dtype))


def _scale(layer: Any) -> float:
    return layer.scale if isinstance(layer, SelfProjecting) else float(layer.inner_dim // layer.heads) ** -0.5
