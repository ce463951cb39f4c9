"""Calibrations whose numbers would make a release fail, for some rows or for all: refused when read, and when a host is protected."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dp_xattn.calibration.calibration import Calibration
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.inputs import LayerRows
from hf_dp_xattn.mechanisms.kernel_sum import contributions, sketch
from hf_dp_xattn.mechanisms.registry import prepare_release

from .synthetic import SyntheticModel

MODEL = SyntheticModel()
CONFIG = DPXAttnConfig(mechanism="kernel_sum", unit="row", projection_dim=0, logit_bound=1.0, degree=1)
GOOD = MODEL.calibrate(CONFIG)
POSITIVE = ("key_radius", "query_radius", "value_scale", "normalizer_weight", "key_range")


def with_geometry(**changes: Any) -> Calibration:
    first = {n: change(getattr(GOOD.geometries[0], n)) for n, change in changes.items()}
    geometries = (dataclasses.replace(GOOD.geometries[0], **first), *GOOD.geometries[1:])
    return dataclasses.replace(GOOD, geometries=geometries)


def with_plan(**changes: Any) -> Calibration:
    plan = GOOD.plans[0]
    changed = {n: change(getattr(plan, n)) for n, change in changes.items()}
    return dataclasses.replace(GOOD, plans=(dataclasses.replace(plan, **changed),))


def with_basis(name: str, change: Any) -> Calibration:
    assert GOOD.basis is not None
    parts = tuple(change(t) for t in getattr(GOOD.basis, name))
    return dataclasses.replace(GOOD, basis=dataclasses.replace(GOOD.basis, **{name: parts}))


HOSTILE: dict[str, Calibration] = {
    **{f"{n} is 0": with_geometry(**{n: torch.zeros_like}) for n in POSITIVE},
    **{f"{n} is negative": with_geometry(**{n: torch.neg}) for n in POSITIVE},
    **{f"{n} is tiny": with_geometry(**{n: lambda t: t * 0 + 1e-300}) for n in POSITIVE},
    **{f"{n} is huge": with_geometry(**{n: lambda t: t * 0 + 1e150}) for n in POSITIVE},
    "key_map is huge": with_geometry(key_map=lambda t: t + 1e300),
    "weight_map is huge": with_geometry(weight_map=lambda t: t + 1e300),
    "key_radius is float32": with_geometry(key_radius=torch.Tensor.float),
    "key_map holds integers": with_geometry(key_map=torch.Tensor.long),
    "scale is negative": with_geometry(scale=lambda s: -1.0),
    "clip_norm is huge": dataclasses.replace(GOOD, clip_norm=1e170),
    "clip_norm is tiny": dataclasses.replace(GOOD, clip_norm=1e-299),
    "units have no end": dataclasses.replace(GOOD, units=10**400),
    "a plan's weight is 0": with_plan(weight=torch.zeros_like),
    "a plan's weight is negative": with_plan(weight=torch.neg),
    "a plan's clip_norm is tiny": with_plan(clip_norm=lambda c: 1e-299),
    "a plan's center is huge": with_plan(center=lambda t: t + 1e300),
    "a plan's cov_y is no covariance": with_plan(cov_y=torch.neg),
    "a plan's cov_zy is float32": with_plan(cov_zy=torch.Tensor.float),
    "analysis is huge": with_basis("analysis", lambda t: t + 1e30),
    "synthesis is float64": with_basis("synthesis", torch.Tensor.double),
}


@pytest.mark.parametrize("what", HOSTILE)
@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_hostile_numbers_are_refused_before_any_row(what: str, mechanism: str) -> None:
    with pytest.raises(ConfigError, match="damaged"):
        prepare_release(CONFIG.replace(mechanism=mechanism, tree_bins=4), MODEL.specs, HOSTILE[what])


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_numbers_are_refused_when_read(what: str, tmp_path: Path) -> None:
    hostile = HOSTILE[what]
    for name, content in hostile.files().items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError):
        Calibration.load(tmp_path)


def test_a_good_one_passes(tmp_path: Path) -> None:
    for name, content in GOOD.files().items():
        (tmp_path / name).write_bytes(content)
    Calibration.load(tmp_path).check(CONFIG, MODEL.specs)


@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree"])
def test_no_number_that_slips_through_lets_a_row_fail_a_release(
    mechanism: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defence in depth: with the checks gone, rows at the centre and elsewhere are released all the same."""
    monkeypatch.setattr(Calibration, "verify", lambda self: None)
    config = CONFIG.replace(mechanism=mechanism, tree_bins=4)
    own = tuple(dataclasses.replace(g, key_radius=g.key_radius.clone()) for g in GOOD.geometries)
    prepared: Any = prepare_release(
        config, MODEL.specs, dataclasses.replace(GOOD, geometries=own, basis=None, plans=())
    )
    for geometry in own:
        geometry.key_radius.zero_()
    keys, values = MODEL.rows(MODEL.contexts(1, seed=5)[0])
    centre = [g.key_center[:, None].expand_as(k).float() for g, k in zip(own, keys, strict=True)]
    for rows in (keys, centre):
        prepared.exact(LayerRows(rows, values), None)


def test_a_sketch_that_overflows_is_a_number() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for unit in (torch.tensor([[float("inf")]]), torch.tensor([[float("nan")]]), torch.tensor([[1.0]])):
        clipped = sketch.clip_sketch(unit.double(), one * 0.0, one * 0.0, 20, 2**34)
        assert clipped.isfinite().all() and clipped.abs().max() <= 2**34


def test_weights_of_no_range_are_numbers() -> None:
    nan = torch.full((2,), float("nan"), dtype=torch.float64)
    assert torch.equal(contributions.exact_exp(nan), torch.ones(2, dtype=torch.float64))
    assert torch.equal(contributions.quantize(nan, 1.0), torch.zeros(2, dtype=torch.float64))
