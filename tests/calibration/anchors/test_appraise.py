"""What a calibration that exists is worth: said without a change to what its releases are decoded to, and the same every time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_dp_xattn.calibration.anchors.anchors_calibration import AnchorCalibration
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, fit_anchors
from hf_dp_xattn.calibration.anchors.appraise import appraise
from hf_dp_xattn.calibration.anchors.simulated import simulate
from hf_dp_xattn.calibration.anchors.slots_fit import SlotSettings
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.errors import ConfigError

from .synthetic_contexts import contexts, public_data

CONFIG = DPXAttnConfig(mechanism="anchors", unit="row")


@pytest.fixture(scope="module")
def old() -> AnchorCalibration:
    """Of a time when plans did not say what they are worth."""
    slots = SlotSettings(code=8, slots=4, hidden=32, directions=8, steps=120, batch=32, queries=16)
    settings = AnchorSettings(releases=("sum",), slots=slots, epsilons=(0.05, 8.0))
    made = fit_anchors(CONFIG, public_data(contexts(300)), settings)
    plans = tuple(dataclasses.replace(p, worth=None, likeness=None) for p in made.plans)
    return dataclasses.replace(made, plans=plans, decoders=dataclasses.replace(made.decoders, fallback=None))


def test_it_is_said_and_nothing_else_changes(old: AnchorCalibration) -> None:
    data = public_data(contexts(120, seed=7))
    found = appraise(old, CONFIG, data).rounded()
    noise, good = (p.worth for p in found.plans)
    assert noise is not None and good is not None
    # the intervals of its plans still say nothing of kinds that it was not fitted to
    assert not any(p.tried_on_unseen for p in found.plans)
    assert good.useful and good.ratio < 0.6 and not noise.useful
    assert found.useless(CONFIG.replace(epsilon=0.05)) and found.useless(CONFIG) is None
    private = contexts(5, seed=9)
    for before, after in zip(old.plans, found.plans, strict=True):
        pairs = zip(
            simulate(before, CONFIG, old.decoders, private),
            simulate(after, CONFIG, found.decoders, private),
            strict=True,
        )
        assert all(
            torch.equal(a.rows, b.rows) and torch.equal(a.log_weights, b.log_weights) for a, b in pairs
        )
    again = appraise(old, CONFIG, data).rounded()
    assert [p.worth for p in again.plans] == [p.worth for p in found.plans]
    with pytest.raises(ConfigError, match="already"):
        appraise(found, CONFIG, data)


def test_too_few_contexts(old: AnchorCalibration) -> None:
    with pytest.raises(ConfigError, match="at least 40"):
        appraise(old, CONFIG, public_data(contexts(30)))
