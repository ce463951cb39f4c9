"""Release "mixed" in a calibration: the fitted move, the choice between like and unlike contexts, files."""

from __future__ import annotations

import dataclasses
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dp_xattn import ConfigError, DPXAttnConfig
from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors, simulate
from hf_dp_xattn.calibration.anchors.mixed_fit import LIKE_COST, Compared
from hf_dp_xattn.calibration.anchors.objective import fvu
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts
from hf_dp_xattn.calibration.stored import JSON_NAME, TENSORS_NAME
from hf_dp_xattn.privacy.bits import SeededEntropy

from ...mechanisms.anchors.naive_anchors import CHANNELS as HAND_CHANNELS
from ...sealed import write_sealed
from ..anchor_calibrations import calibration
from .synthetic_contexts import CHANNELS, contexts, objective, public_data

ROWS = 280
SETTINGS = AnchorSettings(releases=("histogram", "mixed"), anchors=24, tilt_steps=20, validation=24)
HAND = {4.0: ("mixed", 0.5, 0.4, 0.6)}


def config(**changes: object) -> DPXAttnConfig:
    return DPXAttnConfig(unit="row", mechanism="anchors").replace(**changes)


def long_contexts(count: int, seed: int, off: float = 0.0) -> PublicContexts:
    """Rows around 8 fixed points, each context with a mix and a small offset of its own; off: how far all of it is from the public mean."""
    fixed = torch.Generator().manual_seed(77)
    centers = 1.5 * torch.randn(8, CHANNELS, generator=fixed)
    away = torch.randn(CHANNELS, generator=fixed)
    g = torch.Generator().manual_seed(seed)
    which = torch.multinomial(torch.rand(count, 8, generator=g) ** 2, ROWS, replacement=True, generator=g)
    own = 0.3 * torch.randn(count, 1, CHANNELS, generator=g) + off * away
    rows = (centers[which] + own + 0.5 * torch.randn(count, ROWS, CHANNELS, generator=g)).half()
    return PublicContexts(rows, torch.ones(rows.shape[:2], dtype=torch.bool), rows)


@pytest.fixture(scope="module")
def fitted() -> dict[str, AnchorCalibration]:
    """With both candidates, and with the histogram alone."""
    return {
        name: fit_anchors(
            config(),
            public_data(long_contexts(120, 0), objective(public=0)),
            dataclasses.replace(SETTINGS, releases=releases, epsilons=(0.02, 8.0)),
        )
        for name, releases in (("mixed", ("histogram", "mixed")), ("histogram", ("histogram",)))
    }


def measured(calibration: AnchorCalibration, index: int, fresh: PublicContexts) -> float:
    decoded = simulate(calibration.plans[index], config(), calibration.decoders, fresh, seed=5)
    return fvu(*objective(public=0).measure(fresh.whole.float(), [(c.rows, c.log_weights) for c in decoded]))


def test_mixed_is_chosen_where_contexts_leave_the_cells(fitted: dict[str, AnchorCalibration]) -> None:
    found = fitted["mixed"]
    assert found.plans[1].release == "mixed" and found.decoders.move is not None
    (at_eight,) = (c for c in found.settings["mixed"] if c["epsilon"] == 8.0)
    assert at_eight["unlike"] < at_eight["histogram_unlike"]


@pytest.mark.parametrize("off", [0.0, 0.5], ids=["like", "unlike"])
def test_it_follows_contexts_off_the_public_mean(fitted: dict[str, AnchorCalibration], off: float) -> None:
    fresh = long_contexts(24, 9, off)
    with_sum, alone = (measured(fitted[name], 1, fresh) for name in ("mixed", "histogram"))
    assert with_sum < 0.8 * alone


def test_no_worse_than_the_public_mean_at_small_epsilon(fitted: dict[str, AnchorCalibration]) -> None:
    assert fitted["mixed"].plans[0].quality.fvu < 1.1
    mixed = dataclasses.replace(fitted["mixed"].plans[1], epsilon=0.02)
    calibration = dataclasses.replace(fitted["mixed"], plans=(mixed,))
    assert measured(calibration, 0, long_contexts(24, 9)) < 1.1


def test_files_give_back_the_same_release(fitted: dict[str, AnchorCalibration], tmp_path: Path) -> None:
    fitted["mixed"].save_pretrained(tmp_path)
    loaded = AnchorCalibration.from_pretrained(tmp_path)
    rows = long_contexts(1, 3).units[0].float()
    a, b = (
        c.prepare(config(epsilon=8.0)).run(rows, entropy=SeededEntropy(4)).context
        for c in (fitted["mixed"], loaded)
    )
    assert torch.equal(a.rows, b.rows) and torch.equal(a.log_weights, b.log_weights)


def test_the_rule() -> None:
    """A ratio that like contexts lose must be gained on unlike ones, and like ones lose at most LIKE_COST."""
    assert Compared(8.0, 0.40, 0.70, 0.40, 1.0).mixed
    assert Compared(8.0, 0.41, 0.90, 0.40, 1.0).mixed
    assert not Compared(8.0, 0.41, 0.99, 0.40, 1.0).mixed
    assert not Compared(8.0, 0.40 * LIKE_COST + 0.001, 0.10, 0.40, 1.0).mixed
    assert not Compared(8.0, 0.40, 1.0, 0.40, 1.0).mixed


def test_short_contexts_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'mixed' is for public contexts of at least 256 rows"):
        fit_anchors(
            config(),
            public_data(contexts(100)),
            dataclasses.replace(SETTINGS, releases=("mixed",), epsilons=(8.0,)),
        )


@pytest.mark.parametrize("damage", ["missing", "shape", "moment", "scale", "NaN", "without plan"])
def test_damaged_moves_are_refused(tmp_path: Path, damage: str) -> None:
    calibration(qualities=HAND, scores={}).save_pretrained(tmp_path)
    assert AnchorCalibration.from_pretrained(tmp_path).decoders.move is not None
    tensors = load_file(tmp_path / TENSORS_NAME)
    header = json.loads((tmp_path / JSON_NAME).read_text())
    if damage == "missing":
        del tensors["move.cross"]
    elif damage == "shape":
        tensors["move.cross"] = torch.zeros(HAND_CHANNELS + 1, tensors["move.cross"].shape[1])
    elif damage == "moment":
        tensors["move.moment"] = -tensors["move.moment"]
    elif damage == "scale":
        tensors["move.scale"] = torch.tensor(0.0)
    elif damage == "NaN":
        tensors["move.codes"][0, 0] = torch.nan
    else:
        header["plans"][0]["release"] = "histogram"
    save_file(tensors, tmp_path / TENSORS_NAME)
    header["tensors_sha256"] = sha256((tmp_path / TENSORS_NAME).read_bytes()).hexdigest()
    write_sealed(tmp_path / JSON_NAME, header)
    with pytest.raises(ConfigError):
        AnchorCalibration.from_pretrained(tmp_path)
