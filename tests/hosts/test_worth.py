"""A release that is not known to be better than none is refused before the charge, unless the user goes on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.mechanisms.anchors.fallback import Fallback, Worth

from ..hosts_tiny import tiny_sd
from .anchor_calibrations import CONFIG, calibration_for

CLOSE, SURE = (Worth("mean", 0.0, "fvu", 0.99, high) for high in (1.01, 0.999))


def with_worth(pipe: Any, worth: Worth | None) -> Any:
    made = calibration_for(pipe)
    channels = made.channels
    plans = tuple(dataclasses.replace(p, worth=worth) for p in made.plans)
    fallback = Fallback(torch.zeros(2, channels), torch.zeros(2))
    return dataclasses.replace(
        made, plans=plans, decoders=dataclasses.replace(made.decoders, fallback=fallback)
    )


def test_a_useless_plan_is_refused_and_nothing_is_spent() -> None:
    pipe, ledger = tiny_sd(), dpx.Ledger()
    with pytest.raises(dpx.ConfigError, match=r"not known to be better.*the public mean.*allow_useless=True"):
        dpx.protect(pipe, CONFIG, calibration=with_worth(pipe, CLOSE), ledger=ledger)
    assert dpx.handle_of(pipe) is None and len(ledger.entries()) == 0
    with dpx.protect(
        pipe, CONFIG, calibration=with_worth(pipe, CLOSE), ledger=ledger, allow_useless=True
    ) as protected:
        protected.release("a red circle")
    assert ledger.entries()


@pytest.mark.parametrize("worth", [SURE, None], ids=["better", "never compared"])
def test_other_plans_are_not(worth: Worth | None) -> None:
    pipe = tiny_sd()
    dpx.protect(pipe, CONFIG, calibration=with_worth(pipe, worth)).unprotect()


def test_a_restored_host_asks_again(tmp_path: Path) -> None:
    pipe = tiny_sd()
    dpx.protect(pipe, CONFIG, calibration=with_worth(pipe, CLOSE), allow_useless=True)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(dpx.ConfigError, match="allow_useless"):
        dpx.from_pretrained(tmp_path)
    restored = dpx.handle_of(dpx.from_pretrained(tmp_path, allow_useless=True)).calibration
    assert restored.plans[0].worth == CLOSE and restored.decoders.fallback is not None


def test_the_plan_says_so() -> None:
    made = with_worth(tiny_sd(), CLOSE)
    plan = dpx.plan(made, epsilon=8.0, measure=False)
    assert plan.points[0].useless is not None and " x" in str(plan)
    assert "allow_useless=True" in str(plan) and plan.to_dict()["points"][0]["useless"]
    assert dpx.plan(with_worth(tiny_sd(), SURE), epsilon=8.0, measure=False).points[0].useless is None


@pytest.mark.parametrize(
    "damage",
    [
        {"against": "other"},
        {"weight": 1.5},
        {"high": float("nan")},
        {"measure": "taste"},
    ],
    ids=lambda d: next(iter(d)),
)
def test_damaged_worth(tmp_path: Path, damage: dict[str, Any]) -> None:
    made = with_worth(tiny_sd(), dataclasses.replace(CLOSE, **damage))
    with pytest.raises(dpx.ConfigError):
        made.verify()
