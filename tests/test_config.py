from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_dp_xattn.config import CONFIG_NAME, DPXAttnConfig
from hf_dp_xattn.errors import ConfigError


def test_round_trip(tmp_path: Path) -> None:
    config = DPXAttnConfig(mechanism="kernel_sum", epsilon=3.0, degree=4, unit="group")
    config.save_pretrained(tmp_path)
    assert DPXAttnConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"epsilon": "8"},
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": math.nan},
        {"logit_bound": 0.0},
        {"value_bound": 0.0},
        {"value_bound": math.nan},
        {"degree": 5},
        {"degree": 2.0},
        {"degree": True},
        {"mechanism": "magic"},
        {"unit": "word"},
        {"neighboring": "swap"},
        {"features": "relu"},
        {"normalizer_floor": 0.0},
        {"schema_version": 2},
        {"temperature": 1.0},
        {"epsilon": 10**400},
        {"epsilon": float("inf")},
        {"epsilon": float("nan")},
    ],
    ids=str,
)
def test_bad_values_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        DPXAttnConfig.from_dict({**DPXAttnConfig(mechanism="kernel_sum", unit="row").to_dict(), **bad})


def test_newer_version_is_named(tmp_path: Path) -> None:
    values = {
        **DPXAttnConfig(mechanism="kernel_sum", unit="row").to_dict(),
        "schema_version": 7,
        "new_knob": 1,
    }
    (tmp_path / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="newer version"):
        DPXAttnConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing key", "list", "absent"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    path = DPXAttnConfig(mechanism="kernel_sum", unit="row").save_pretrained(tmp_path)
    if damage == "truncated":
        path.write_text(path.read_text()[:-20])
    elif damage == "missing key":
        values = json.loads(path.read_text())
        del values["unit"]
        path.write_text(json.dumps(values))
    elif damage == "list":
        path.write_text("[]")
    else:
        path.unlink()
    with pytest.raises(ConfigError):
        DPXAttnConfig.from_pretrained(tmp_path)


def test_a_whole_context_has_no_neighbour_that_is_added_or_removed() -> None:
    """The only one would be no context, of which nothing is released: a promise about nobody."""
    values = DPXAttnConfig(mechanism="kernel_sum", unit="context").to_dict()
    for make in (
        lambda: DPXAttnConfig(mechanism="kernel_sum", unit="context", neighboring="add_or_remove_one"),
        lambda: DPXAttnConfig(mechanism="kernel_sum", unit="context").replace(
            neighboring="add_or_remove_one"
        ),
        lambda: DPXAttnConfig.from_dict({**values, "neighboring": "add_or_remove_one"}),
    ):
        with pytest.raises(ConfigError, match="replace_one"):
            make()
