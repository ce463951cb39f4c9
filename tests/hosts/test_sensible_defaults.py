"""What `protect` does where little is said: defaults that protect something, and no budget spent for noise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.few_units import too_few
from hf_dp_xattn.hosts.accounts import Settings
from hf_dp_xattn.hosts.worth import enough_units

from .anchor_calibrations import calibration_for
from .text.libraries import library

pytestmark = pytest.mark.as_users
KERNEL = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context", degree=1, projection_dim=4)
ROOT = Path(__file__).resolve().parents[2]


def test_a_phrase_is_the_unit_and_a_library_the_mechanism() -> None:
    config = dpx.DPXAttnConfig()
    assert (config.mechanism, config.unit, config.neighboring) == ("library", "group", "replace_one")
    assert dpx.DPXAttnConfig(unit="row").mechanism == "anchors"  # which a library cannot give
    assert dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row") == dpx.DPXAttnConfig(
        **dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row").to_dict()
    )


def test_a_calibration_decides_what_nobody_named(pipe: Any, tmp_path: Path) -> None:
    made = library(pipe, unit="context")
    made.save_pretrained(tmp_path)
    with dpx.protect(pipe, epsilon=4.0, calibration=tmp_path) as handle:
        assert (handle.config.unit, handle.config.epsilon) == ("context", 4.0)
        assert dpx.protect(pipe) is handle
    with dpx.protect(pipe, dpx.DPXAttnConfig(epsilon=2.0), calibration=str(tmp_path)) as handle:
        assert (handle.config.unit, handle.config.epsilon) == ("context", 2.0)
    for named in ({"unit": "group"}, {"mechanism": "anchors"}):
        with pytest.raises(dpx.ConfigError, match="config says"):
            dpx.protect(pipe, dpx.DPXAttnConfig(**named), calibration=made)  # type: ignore[arg-type]
    with pytest.raises(dpx.ConfigError, match="not both"):
        dpx.protect(pipe, dpx.DPXAttnConfig(), epsilon=4.0, calibration=made)
    assert dpx.handle_of(pipe) is None


def test_without_a_calibration_nothing_is_patched(pipe: Any) -> None:
    with pytest.raises(dpx.ConfigError, match=r"dpx\.calibrate\(host"):
        dpx.protect(pipe, epsilon=8.0)
    with pytest.raises(
        dpx.ConfigError, match=r"(?s)draws noise.*hf-dp-xattn calibrate.*allow_uncalibrated=True"
    ):
        dpx.protect(pipe, KERNEL)
    assert dpx.handle_of(pipe) is None
    with dpx.protect(pipe, KERNEL, allow_uncalibrated=True) as handle:
        assert handle.active and dpx.protect(pipe, KERNEL) is handle


def test_a_large_epsilon_is_warned_of_and_a_huge_one_refused(pipe: Any) -> None:
    with pytest.raises(dpx.ConfigError, match="allow_large_epsilon"):
        dpx.protect(pipe, KERNEL.replace(epsilon=1e6), allow_uncalibrated=True)
    with pytest.warns(UserWarning, match="epsilon = 17"):
        dpx.protect(pipe, KERNEL.replace(epsilon=17.0), allow_uncalibrated=True).unprotect()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "epsilon =")
        dpx.protect(pipe, KERNEL.replace(epsilon=16.0), allow_uncalibrated=True).unprotect()


def test_rows_are_said_to_be_no_prompt(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="no word, and nothing whole"):
        handle = dpx.protect(pipe, KERNEL.replace(unit="row"), allow_uncalibrated=True)
    assert "no word, and nothing whole" in str(handle.report())
    assert "neither a word nor the prompt" in str(KERNEL.replace(unit="row").card({}))
    handle.unprotect()


def test_a_report_tells_the_budget_in_the_terms_of_the_config(pipe: Any) -> None:
    with dpx.protect(pipe, KERNEL, allow_uncalibrated=True) as handle:
        assert "each release spends epsilon 8 at delta 1e-05, and each context has the budget for one" in str(
            handle.report()
        )
    with dpx.protect(
        pipe, KERNEL, allow_uncalibrated=True, budget=dpx.Budget(8000.0, 0.01), ledger=dpx.Ledger()
    ) as handle:
        assert "a budget of epsilon 8000 at delta 0.01, 1000 times that" in str(handle.report())


def test_the_plan_says_where_units_are_too_few() -> None:
    chat = ROOT / "examples/chat/calibrations/group"
    found = {n: dpx.plan(chat, epsilon=8.0, n=n, measure=False).points[0] for n in (150, 12, 3)}
    assert found[150].fvu.value < found[12].fvu.value < found[3].fvu.value
    assert found[150].useless is None and found[12].useless is None
    assert "too few" in str(found[3].useless)
    assert "too few" in str(dpx.plan(chat, epsilon=8.0, n=3, measure=False))


def test_too_few_units_are_refused_before_the_charge() -> None:
    made = dpx.Calibration.from_pretrained(ROOT / "examples/chat/calibrations/group")
    config = dpx.DPXAttnConfig(epsilon=8.0).made_for(made)
    check = enough_units(Settings(config, made))
    assert check is not None
    check(150)
    with pytest.raises(dpx.ContextError, match=r"(?s)3 units are too few.*Nothing was spent"):
        check(3)
    hidden = config.replace(neighboring="add_or_remove_one")
    assert enough_units(Settings(hidden, made)) is None  # their number is private


def test_a_release_of_too_few_rows_spends_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = calibration_for(pipe)
    config = dpx.DPXAttnConfig(epsilon=8.0).made_for(made)
    rows = torch.randn(4, made.channels)

    def never(units: int) -> None:
        raise dpx.ContextError(f"{units} units are too few")

    monkeypatch.setattr(
        "hf_dp_xattn.hosts.protect.enough_units", lambda s: None if s.allow_useless else never
    )
    with dpx.protect(pipe, config, calibration=made, ledger=dpx.Ledger()) as handle:
        with pytest.raises(dpx.ContextError, match="4 units"):
            handle.release(rows)
        assert not handle.releases.spent and handle.ledger.entries() == ()
    with dpx.protect(pipe, config, calibration=made, ledger=dpx.Ledger(), allow_useless=True) as handle:
        assert handle.release(rows).contexts
    assert too_few(made, 8.0, made.units) is None
