"""Files of `anchors` whose numbers would make a release fail once it is charged: refused when read, or served."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration

from ..hosts_tiny import tiny_sd
from .anchor_calibrations import calibration_for

CONFIG = dpx.DPXAttnConfig(unit="row", mechanism="anchors")


def with_cells(pipe: Any, **changes: Any) -> AnchorCalibration:
    good = calibration_for(pipe, "histogram")
    cells = good.decoders.cells
    assert cells is not None
    changed = {n: change(getattr(cells, n)) for n, change in changes.items()}
    decoders = dataclasses.replace(good.decoders, cells=dataclasses.replace(cells, **changed))
    return dataclasses.replace(good, decoders=decoders)


def with_head(pipe: Any, **changes: Any) -> AnchorCalibration:
    good = calibration_for(pipe, "sum")
    plan = good.plans[0]
    assert plan.head is not None
    head = dataclasses.replace(plan.head, **{n: c(getattr(plan.head, n)) for n, c in changes.items()})
    return dataclasses.replace(good, plans=(dataclasses.replace(plan, head=head),))


@pytest.mark.parametrize(
    "make",
    [
        lambda pipe: with_cells(pipe, coarse=lambda t: t + 2**50),
        lambda pipe: with_cells(pipe, coarse=lambda t: t - 1),
        lambda pipe: with_cells(pipe, coarse=lambda t: t.to(torch.int8)),
        lambda pipe: with_head(pipe, scale=torch.zeros_like),
        lambda pipe: with_head(pipe, scale=torch.neg),
    ],
    ids=["2^50 groups", "a negative group", "groups in 8 bits", "scale 0", "negative scale"],
)
def test_hostile_numbers_are_refused_when_read(make: Any, tmp_path: Path) -> None:
    make(tiny_sd()).save_pretrained(tmp_path)
    with pytest.raises(dpx.ConfigError, match="damaged"):
        dpx.Calibration.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "make",
    [
        lambda pipe: with_cells(pipe, support=torch.Tensor.double, log_prior=torch.Tensor.double),
        lambda pipe: with_head(pipe, bias=torch.Tensor.double, center=torch.Tensor.bfloat16),
    ],
    ids=["cells", "head"],
)
def test_other_floats_are_read_as_float32(make: Any, tmp_path: Path) -> None:
    pipe = tiny_sd()
    make(pipe).save_pretrained(tmp_path)
    handle = dpx.protect(pipe, CONFIG, calibration=dpx.Calibration.from_pretrained(tmp_path))
    handle.release(torch.randn(6, 32))
    assert len(handle.report().releases) == 1
