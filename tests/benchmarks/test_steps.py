"""Steps of protected and unprotected pipelines of the same weights, as `benchmarks/steps.py` times them, at small sizes."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import steps

SMALL = {"pixart": {"heads": 2, "text": 64, "depth": 1}, "sdxl": {"widths": (32, 64, 64), "text": 512}}


@pytest.mark.parametrize(("name", "mechanism"), [("pixart", "anchors"), ("sdxl", "library")])
def test_both_draw_and_all_is_said(name: str, mechanism: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = steps.compare(name, mechanism, 2, size=128, **SMALL[name])
    low, high = found["interval"]  # type: ignore[misc]
    assert 0 < low <= found["step_ratio"] <= high and found["release_s"] > 0  # type: ignore[operator]
    (line,) = steps.markdown([found])[-1:]
    assert f"`{mechanism}`" in line and steps.HOSTS[name].words in line
