"""Whether a calibration's numbers are such that no row can make a release fail: of their dtype, bounded, and positive where they divide.

Privacy rests on it. A radius of 0, say, divides by 0: a row that lies at the centre then gives NaN and every other row a number, and
whether the release succeeds tells which. Within these ranges every product and quotient of a row stays finite in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..artefacts.checks import Sizes
from ..mechanisms.kernel_sum.geometry import HeadGeometry
from ..mechanisms.kernel_sum.sketch import SketchBasis
from .plan_entry import PlanEntry
from .stored import CHECKS

LEAST, LARGEST = 2.0**-64, 2.0**64
LARGEST_RADIUS = 2.0**20  # its powers up to the degree stay finite
_DIVIDES = ("value_scale", "normalizer_weight", "key_range")


def _fit(sizes: Sizes, name: str, tensor: torch.Tensor, *dims: str | int, dtype: torch.dtype) -> None:
    sizes.fit(name, tensor, *dims)
    if tensor.dtype != dtype:
        CHECKS.refuse(f"{name} holds {tensor.dtype}, expected {dtype}")
    if bool((tensor.abs() > LARGEST).any()):
        CHECKS.refuse(f"{name} holds numbers above 2^64")


def _within(name: str, tensor: torch.Tensor, high: float = LARGEST) -> None:
    if not bool(((tensor >= LEAST) & (tensor <= high)).all()):
        CHECKS.refuse(f"{name} holds numbers outside of [{LEAST:.3g}, {high:.3g}]")


def verify_norm(value: object, where: str) -> None:
    """A clipping bound."""
    CHECKS.number(value, where, low=LEAST, high=LARGEST)


def verify_geometry(name: str, g: HeadGeometry) -> None:
    """Raises ConfigError for shapes, dtypes, and numbers out of range."""
    CHECKS.number(g.scale, f"{name}: scale", low=0.0, high=LARGEST)
    sizes, double = CHECKS.sizes(), torch.float64
    for part in ("key_center", "query_center", "weight_map"):
        _fit(sizes, f"{name}: {part}", getattr(g, part), "H", "d", dtype=double)
    for part in ("key_map", "query_map"):
        _fit(sizes, f"{name}: {part}", getattr(g, part), "H", "p", "d", dtype=double)
    _fit(sizes, f"{name}: value_center", g.value_center, "H", "dv", dtype=double)
    for part in ("key_radius", "query_radius", *_DIVIDES):
        _fit(sizes, f"{name}: {part}", getattr(g, part), "H", dtype=double)
        _within(f"{name}: {part}", getattr(g, part), LARGEST if part in _DIVIDES else LARGEST_RADIUS)
    if min(sizes[d] for d in ("H", "d", "p", "dv")) < 1:
        CHECKS.refuse(f"{name} has no heads or no channels")


def verify_basis(basis: SketchBasis, geometries: Sequence[HeadGeometry]) -> int:
    """The rank. Raises ConfigError as `verify_geometry` does."""
    sizes = CHECKS.sizes()
    for i, g in enumerate(geometries):
        shape = g.heads, f"r{i}", g.value_dim + 1
        _fit(sizes, f"basis {i}: analysis", basis.analysis[i], *shape, "R", dtype=torch.float32)
        _fit(sizes, f"basis {i}: synthesis", basis.synthesis[i], *shape, "R", dtype=torch.float32)
        _fit(sizes, f"basis {i}: mean_sums", basis.mean_sums[i], *shape, dtype=basis.mean_sums[i].dtype)
        if not basis.mean_sums[i].is_floating_point():
            CHECKS.refuse(f"basis {i}: mean_sums holds no floats")
    return sizes["R"]


def verify_plan(plan: PlanEntry, rank: int) -> None:
    """Raises ConfigError as `verify_geometry` does."""
    where, double = f"plan for epsilon {plan.epsilon!r}", torch.float64
    CHECKS.number(plan.epsilon, f"{where}: epsilon", low=1e-9)
    CHECKS.number(plan.delta, f"{where}: delta", low=0.0, high=1.0)
    verify_norm(plan.clip_norm, f"{where}: clip_norm")
    CHECKS.number(plan.predicted_fvu, f"{where}: predicted_fvu")
    sizes = CHECKS.sizes()  # a plan keeps the first K of R directions
    for name in ("weight", "center", "mean_a"):
        _fit(sizes, f"{where}: {name}", getattr(plan, name), "K", dtype=double)
    _fit(sizes, f"{where}: cov_y", plan.cov_y, "K", "K", dtype=double)
    _fit(sizes, f"{where}: cov_zy", plan.cov_zy, rank, "K", dtype=double)
    _within(f"{where}: weight", plan.weight)
    if not 1 <= sizes["K"] <= rank:
        CHECKS.refuse(f"{where}: no directions, or more than the basis has")
    least = torch.linalg.eigvalsh(plan.cov_y).min()
    size = float(plan.cov_y.abs().max())
    if not torch.allclose(plan.cov_y, plan.cov_y.mT, rtol=0.0, atol=1e-6 * size) or least < -1e-6 * size:
        CHECKS.refuse(f"{where}: cov_y is no covariance")
