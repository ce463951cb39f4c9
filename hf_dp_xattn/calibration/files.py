"""The `Calibration` of kernel sums on disk: JSON for what a person reads, safetensors for the rest. Read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import FEATURES, DPXAttnConfig
from ..mechanisms.kernel_sum.geometry import HeadGeometry
from ..mechanisms.kernel_sum.sketch import SketchBasis
from .checks import Sizes, check_keys, integer, number, refuse
from .stored import Tensors, read_header, read_stored, write_stored

if TYPE_CHECKING:
    from .calibration import Calibration, PlanEntry

_FIELDS = ("clip_norm", "contexts", "units", "settings")
_KEYS = {"layers", "scales", "has_basis", "plans", *_FIELDS}
_GEOMETRY = tuple(f.name for f in fields(HeadGeometry) if f.name != "scale")
_BASIS = tuple(f.name for f in fields(SketchBasis))


def _tensors(calibration: Calibration) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for i, geometry in enumerate(calibration.geometries):
        tensors |= {f"geometry.{i}.{k}": v for k, v in geometry.tensors().items()}
    if calibration.basis is not None:
        for name in _BASIS:
            tensors |= {f"basis.{i}.{name}": t for i, t in enumerate(getattr(calibration.basis, name))}
    for i, entry in enumerate(calibration.plans):
        tensors |= {f"plan.{i}.{name}": getattr(entry, name) for name in entry.TENSORS}
    return tensors


def save_kernel_sum(calibration: Calibration, folder: Path) -> None:
    """Writes the two files."""
    header = {
        "layers": list(calibration.layers),
        "scales": [g.scale for g in calibration.geometries],
        **{name: getattr(calibration, name) for name in _FIELDS},
        "has_basis": calibration.basis is not None,
        "plans": [{n: getattr(p, n) for n in p.NUMBERS} for p in calibration.plans],
    }
    write_stored(folder, header, _tensors(calibration))


def load_kernel_sum(folder: Path) -> Calibration:
    """Reads and checks the two files; raises ConfigError on anything missing, unknown, damaged or of another schema."""
    header = read_header(folder, _KEYS)

    def build(tensors: Tensors) -> Calibration:
        calibration = _read(header, tensors)
        _verify(calibration)
        return calibration

    return read_stored(folder, header, build, _tensors)


def _read(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Calibration:
    from .calibration import Calibration, PlanEntry

    layers = tuple(str(name) for name in header["layers"])
    geometries = tuple(
        HeadGeometry(
            scale=number(scale, "a layer's scale", low=0.0),
            **{n: tensors[f"geometry.{i}.{n}"] for n in _GEOMETRY},
        )
        for i, scale in enumerate(header["scales"])
    )
    basis = None
    if header["has_basis"]:
        parts: dict[str, Any] = {
            n: tuple(tensors[f"basis.{i}.{n}"] for i in range(len(layers))) for n in _BASIS
        }
        basis = SketchBasis(**parts)
    plans = tuple(
        PlanEntry.from_parts(numbers, {n: tensors[f"plan.{i}.{n}"] for n in PlanEntry.TENSORS})
        for i, numbers in enumerate(header["plans"])
    )
    return Calibration(
        layers=layers, geometries=geometries, basis=basis, plans=plans, **{n: header[n] for n in _FIELDS}
    )


def _verify(calibration: Calibration) -> None:
    """Raises ConfigError for parts that do not fit each other."""
    from .calibration import BOUND_FIELDS

    check_keys(calibration.settings, set(BOUND_FIELDS), "the settings of the calibration")
    DPXAttnConfig(**calibration.settings)  # each in its range
    if calibration.settings["features"] not in FEATURES:
        refuse("features")
    number(calibration.clip_norm, "clip_norm", low=1e-300)
    integer(calibration.contexts, "contexts")
    integer(calibration.units, "units")
    if not calibration.layers or len(calibration.layers) != len(calibration.geometries):
        refuse("its layers")
    for name, g in zip(calibration.layers, calibration.geometries, strict=True):
        sizes = Sizes()
        sizes.fit(f"{name}: key_center", g.key_center, "H", "d")
        sizes.fit(f"{name}: query_center", g.query_center, "H", "d")
        sizes.fit(f"{name}: key_map", g.key_map, "H", "p", "d")
        sizes.fit(f"{name}: query_map", g.query_map, "H", "p", "d")
        sizes.fit(f"{name}: weight_map", g.weight_map, "H", "d")
        sizes.fit(f"{name}: value_center", g.value_center, "H", "dv")
        for part in ("key_radius", "query_radius", "value_scale", "normalizer_weight", "key_range"):
            sizes.fit(f"{name}: {part}", getattr(g, part), "H")
    if calibration.basis is None and calibration.plans:
        refuse("plans without a basis")
    rank = _verify_basis(calibration.basis, calibration.geometries) if calibration.basis is not None else 0
    for plan in calibration.plans:
        _verify_plan(plan, rank)


def _verify_basis(basis: SketchBasis, geometries: Sequence[HeadGeometry]) -> int:
    """The rank."""
    sizes = Sizes()
    for i, g in enumerate(geometries):
        rows, columns = f"r{i}", g.value_dim + 1
        sizes.fit(f"basis {i}: analysis", basis.analysis[i], g.heads, rows, columns, "R")
        sizes.fit(f"basis {i}: synthesis", basis.synthesis[i], g.heads, rows, columns, "R")
        sizes.fit(f"basis {i}: mean_sums", basis.mean_sums[i], g.heads, rows, columns)
    return sizes.get("R")


def _verify_plan(plan: PlanEntry, rank: int) -> None:
    where = f"plan for epsilon {plan.epsilon!r}"
    number(plan.epsilon, f"{where}: epsilon", low=1e-9)
    number(plan.delta, f"{where}: delta", low=0.0, high=1.0)
    number(plan.clip_norm, f"{where}: clip_norm", low=1e-300)
    number(plan.predicted_fvu, f"{where}: predicted_fvu")
    sizes = Sizes()  # a plan keeps the first K of R directions
    for name in ("weight", "center", "mean_a"):
        sizes.fit(f"{where}: {name}", getattr(plan, name), "K")
    sizes.fit(f"{where}: cov_y", plan.cov_y, "K", "K")
    sizes.fit(f"{where}: cov_zy", plan.cov_zy, rank, "K")
    if sizes.get("K") > rank:
        refuse(f"{where}: more directions than the basis has")
