"""Growing releases of each kind, small, and what leaves them without noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from hf_dp_xattn import DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.base import LayerSpec
from hf_dp_xattn.mechanisms.growing_release import PreparedGrowing, grow
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum.kernel_sum import PreparedKernelSum
from hf_dp_xattn.mechanisms.kernel_sum.sketch import SketchBasis, SketchPlan
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy import continual
from hf_dp_xattn.privacy.accountant import GaussianEvent

from ..anchors.naive_anchors import CHANNELS, decoders, gen, plan

HEADS, DIM, VALUES = 2, 4, 3
SPECS = [LayerSpec(str(i), HEADS, DIM, VALUES, DIM**-0.5) for i in range(2)]
KERNEL = DPXAttnConfig(unit="row", mechanism="kernel_sum", epsilon=2.0, degree=2)
ANCHORS = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=4.0)
LOUD = 1e7  # hardly any noise
WAYS = ["kernel_sum", "sketch", "sum", "histogram", "response"]
SUMS = WAYS[:-1]


def layer_rows(n: int, seed: int = 0, size: float = 1.0) -> LayerRows:
    g = gen(seed)
    keys = [torch.randn(HEADS, n, DIM, generator=g) * size for _ in SPECS]
    return LayerRows(keys, [torch.rand(HEADS, n, VALUES, generator=g) * size for _ in SPECS])


def sketched(prepared: PreparedKernelSum, rank: int = 5, units: int = 10) -> PreparedKernelSum:
    """The same release through a random public sketch."""
    g = gen(7)
    shapes = [(e.geometry.heads, e.features.size, e.geometry.value_dim + 1) for e in prepared.encoders]
    analysis = tuple(torch.randn(*s, rank, generator=g) / 10 for s in shapes)
    basis = SketchBasis(analysis, analysis, tuple(torch.rand(*s, generator=g) for s in shapes))
    eye = torch.eye(rank, dtype=torch.float64)
    zero = torch.zeros(rank, dtype=torch.float64)
    sketch = SketchPlan(
        basis, 30, 1.0, zero + 1, zero, zero, eye * 100, torch.eye(rank, dtype=torch.float64) * 50, units
    )
    return dataclasses.replace(prepared, sketch=sketch, bound=2**30, clip_norm=1.0)


def prepare(way: str, horizon: int = 8, **changes: object) -> PreparedGrowing:
    if way in ("kernel_sum", "sketch"):
        prepared = prepare_release(KERNEL.replace(**changes), SPECS)
        assert isinstance(prepared, PreparedKernelSum)
        return grow(sketched(prepared) if way == "sketch" else prepared, horizon)
    config = ANCHORS.replace(**changes)
    anchors = prepare_anchors(config, [plan(way)], decoders())
    return grow(anchors, horizon, units=6)


def batch(way: str, n: int, seed: int, size: float = 1.0) -> LayerRows | torch.Tensor:
    return (
        layer_rows(n, seed, size)
        if way in ("kernel_sum", "sketch")
        else torch.randn(n, CHANNELS, generator=gen(seed)) * size
    )


def joined(parts: list[LayerRows | torch.Tensor]) -> LayerRows | torch.Tensor:
    tensors = [p for p in parts if isinstance(p, torch.Tensor)]
    if tensors:
        return torch.cat(tensors)
    layers = [p for p in parts if isinstance(p, LayerRows)]
    keys, values = (
        [torch.cat([getattr(p, name)[i] for p in layers], dim=1) for i in range(len(SPECS))]
        for name in ("keys", "values")
    )
    return LayerRows(keys, values)


@contextmanager
def no_noise() -> Iterator[list[torch.Tensor]]:
    """Silent noise; every vector that leaves, in order."""
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continual, "discrete_gaussian", lambda n, *_, **__: np.zeros(n, dtype=np.int64))
        for cls in (continual._SquareRootStream, continual._TreeStream):

            def spy(self: object, step: int, y: torch.Tensor, original: object = cls.decode) -> torch.Tensor:
                seen.append(y.clone())
                return original(self, step, y)  # type: ignore[operator]

            patch.setattr(cls, "decode", spy)
        yield seen


def run(prepared: PreparedGrowing, batches: list, groups: list | None = None) -> torch.Tensor:  # type: ignore[type-arg]
    """All that leaves, but for the noise."""
    with no_noise() as seen:
        growing = prepared.open()
        for i, b in enumerate(batches):
            growing.append(b, groups=None if groups is None else groups[i])
    return torch.cat(seen)


def flat(total: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A total as one vector."""
    return torch.cat([t.flatten() for t in total])


def squared(a: torch.Tensor, b: torch.Tensor) -> int:
    return sum(int(v) ** 2 for v in (a - b).tolist())


def event_of(prepared: PreparedGrowing) -> GaussianEvent:
    (event,) = prepared.events
    assert isinstance(event, GaussianEvent)
    return event
