"""A kind of calibration that the package has never seen is fitted, written, read and accepted by its entry alone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_dp_xattn.artefacts.codec import Tensors
from hf_dp_xattn.calibration import kinds
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.calibration import Calibration
from hf_dp_xattn.calibration.calibration_card import Described
from hf_dp_xattn.calibration.calibration_options import CalibrationOptions
from hf_dp_xattn.calibration.fit import check, fit
from hf_dp_xattn.calibration.library.text_library import TextLibrary
from hf_dp_xattn.calibration.stored import CHECKS, CODEC, Stored
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.hosts.chosen import chosen_config, read_calibration
from hf_dp_xattn.known_mechanisms import KNOWN

from ..sealed import write_sealed

CONFIG = DPXAttnConfig(mechanism="dptree", unit="row")


@dataclass(frozen=True, eq=False)
class MeanRow(Stored):
    """The mean of all public rows."""

    KIND = "mean row"
    KEYS = frozenset({"kind", "unit"})
    mechanism = "dptree"
    neighboring = "replace_one"

    unit: str
    mean: torch.Tensor

    def header(self) -> dict[str, Any]:
        return {"kind": self.KIND, "unit": self.unit}

    def tensors(self) -> Tensors:
        return {"mean": self.mean}

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> MeanRow:
        return cls(header["unit"], tensors["mean"])

    def verify(self) -> None:
        if not bool(self.mean.isfinite().all()):
            CHECKS.refuse("its mean")

    def described(self) -> Described:
        return Described(self.mechanism, self.unit, self.neighboring, 1, 1, 1, {}, None)


def fit_mean(config: DPXAttnConfig, rows: torch.Tensor, options: CalibrationOptions) -> MeanRow:
    return MeanRow(config.unit, rows.mean(0))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("hf_dp_xattn.calibration.mean_kind")
    module.KIND = kinds.CalibrationKind(MeanRow, fit_mean)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(KNOWN, "dptree", replace(KNOWN["dptree"], calibration="mean_kind"))


def test_those_of_the_package() -> None:
    stored = {name: kinds.kind_for(name).stored for name in KNOWN}
    sums = dict.fromkeys(("kernel_sum", "dptree", "none"), Calibration)
    assert stored == {**sums, "anchors": AnchorCalibration, "library": TextLibrary}
    assert len({cls.KIND for cls in stored.values()}) == len(set(stored.values()))


@pytest.mark.usefixtures("registered")
def test_another_kind_is_one_entry(tmp_path: Path) -> None:
    check(CONFIG, CalibrationOptions())
    with pytest.raises(ConfigError, match="dptree has none"):
        check(CONFIG, CalibrationOptions(replies=1))
    rows: Any = torch.arange(6.0).reshape(3, 2)
    with pytest.raises(ConfigError, match="mean"):  # what a file of it would refuse
        fit(CONFIG, rows / 0, CalibrationOptions())
    fitted = fit(CONFIG, rows, CalibrationOptions())
    fitted.save_pretrained(tmp_path)
    read = read_calibration(tmp_path)
    assert isinstance(read, MeanRow) and torch.equal(read.mean, torch.tensor([2.0, 3.0]))
    assert isinstance(Calibration.from_pretrained(tmp_path), MeanRow) and read_calibration(read) is read
    config = chosen_config(None, 2.0, read)
    assert (config.mechanism, config.unit, config.neighboring) == ("dptree", "row", "replace_one")


@pytest.mark.parametrize("kind", ["mean row", "unheard of", ["a", "list"], {"a": "mapping"}])
def test_a_kind_that_nobody_registered_is_refused(kind: Any, tmp_path: Path) -> None:
    MeanRow("row", torch.zeros(2)).save_pretrained(tmp_path)
    write_sealed(tmp_path / CODEC.json_name, {**CODEC.read_document(tmp_path), "kind": kind})
    with pytest.raises(ConfigError, match=r"unknown|lacks"):
        kinds.load_calibration(tmp_path)
