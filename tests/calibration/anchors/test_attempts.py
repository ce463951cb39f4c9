"""A release kind that fails does not take the others with it; the only one that is left does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hf_dp_xattn.calibration.anchors import anchors_fit, slot_plans
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors
from hf_dp_xattn.calibration.anchors.attempts import Attempts
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError

from .synthetic_contexts import contexts, public_data

SLOTS = SlotSettings(code=8, slots=4, hidden=16, directions=8, steps=4, batch=16, queries=8)
SETTINGS = AnchorSettings(epsilons=(8.0,), anchors=32, rows=16, tilt_steps=4, slots=SLOTS)


def fails(*_: Any, **__: Any) -> Any:
    raise ConfigError("planted.")


@pytest.mark.parametrize(
    ("module", "name", "unit", "releases", "kept"),
    [
        (anchors_fit, "fit_codebook", "row", ("sum", "histogram", "mixed"), "sum"),
        (slot_plans, "train", "row", ("sum", "histogram"), "histogram"),
        (slot_plans, "fit_responses", "context", ("sum", "response"), "sum"),
    ],
)
def test_the_others_are_kept(
    module: Any, name: str, unit: str, releases: tuple[str, ...], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, fails)
    config = DPXAttnConfig(mechanism="anchors", unit=unit)
    data = public_data(
        contexts(200, pooled=unit == "context"), grouping="rows" if unit == "row" else "context"
    )
    settings = dataclasses.replace(SETTINGS, releases=releases)
    with pytest.warns(UserWarning, match=r"left out: planted\. What is kept"):
        calibration = fit_anchors(config, data, settings)
    assert {p.release for p in calibration.plans} == {kept}
    assert calibration.settings["releases"] == [kept] and calibration.settings["left out"]
    with pytest.raises(ConfigError, match="planted"):
        fit_anchors(
            config, data, dataclasses.replace(settings, releases=tuple(r for r in releases if r != kept)[:1])
        )


def test_the_last_kind_raises_its_own_error() -> None:
    attempts = Attempts(("sum", "response"))
    with pytest.warns(UserWarning, match="no memory"), attempts.of("sum"):
        raise RuntimeError("no memory")
    assert "sum" not in attempts and attempts.left == ["response"]
    with pytest.raises(MemoryError), attempts.of("response"):
        raise MemoryError


def test_what_is_no_failure_of_a_fit_is_raised() -> None:
    with pytest.raises(KeyboardInterrupt), Attempts(("sum", "response")).of("sum"):
        raise KeyboardInterrupt
