"""A calibration that was broken off goes on as if it had not been; what cannot be kept is told in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from hf_dp_xattn.calibration.anchors import training_state
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.calibration.checkpoints import Checkpoints, digest
from hf_dp_xattn.calibration.progress import QUIET
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError

from .anchors.synthetic_contexts import contexts, public_data

SLOTS = SlotSettings(code=8, slots=4, hidden=32, directions=8, steps=12, batch=32, queries=16)
SETTINGS = AnchorSettings(releases=("sum", "response"), slots=SLOTS, epsilons=(0.5, 8.0))
STATE = training_state.TrainingState


class Broken(BaseException):
    """As Ctrl-C is."""


@pytest.mark.parametrize("after", [3, 12, 13, 16])
def test_training_goes_on_where_it_was(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, wherever it is broken off: in the training of sums, at its end, in that of answers."""
    config = DPXAttnConfig(mechanism="anchors", unit="group")
    settings = dataclasses.replace(SETTINGS, kept=Checkpoints(tmp_path))
    data = public_data(contexts(80))
    plain = fit_anchors(config, data, dataclasses.replace(settings, kept=Checkpoints()))
    monkeypatch.setattr(training_state, "SECONDS", 0.0)
    calls, keep, stop = [0], STATE.keep, [True]

    def breaking(self: training_state.TrainingState, course: training_state.Course) -> None:
        keep(self, course)
        calls[0] += 1
        if stop[0] and calls[0] == after:
            raise Broken

    monkeypatch.setattr(STATE, "keep", breaking)
    with pytest.raises(Broken):
        fit_anchors(config, data, settings)
    stop[0] = False
    assert fit_anchors(config, data, settings).files() == plain.files()
    assert calls[0] == 13 + 7  # every step once, and the end of each training


def test_another_calibration_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    first, other = (Checkpoints(tmp_path, digest(name)) for name in ("one", "other"))
    first.keep("rows", {"rows": torch.ones(3)})
    assert other.read("rows") is None
    found = first.read("rows")
    assert found is not None and torch.equal(found["rows"], torch.ones(3))
    next(tmp_path.iterdir()).write_bytes(b"half")  # a power cut
    assert first.read("rows") is None


def test_each_reads_what_is_there(tmp_path: Path) -> None:
    made: list[int] = []

    def make(i: int) -> torch.Tensor:
        made.append(i)
        if len(made) == 3:
            raise Broken
        return torch.full((2,), float(i))

    kept = Checkpoints(tmp_path)
    with pytest.raises(Broken):
        list(kept.each([5, 6, 7, 8], "rows", make, QUIET))
    rows = list(kept.each([5, 6, 7, 8], "rows", make, QUIET))
    assert made == [5, 6, 7, 7, 8] and [float(r[0]) for r in rows] == [5.0, 6.0, 7.0, 8.0]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be kept"):
        Checkpoints(tmp_path / "file").keep("rows", {"rows": torch.ones(1)})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_dp_xattn.calibration.checkpoints.save_file", full)
    with pytest.raises(ConfigError, match="No space left"):
        Checkpoints(tmp_path).keep("rows", {"rows": torch.ones(1)})


def test_digests_tell_apart() -> None:
    values = ["a", b"a", 1, 1.0, True, None, ["a"], [["a"]], {"a": 1}, torch.ones(1), torch.ones(1).half()]
    assert len({digest(v) for v in values}) == len(values)
    assert digest([1, (2, 3)]) == digest((1, [2, 3]))
    with pytest.raises(TypeError):
        digest(object())
