"""The planner: curves, choice of a calibration, what it prints, and that it spends nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.curves import INTERPOLATED, MEASURED, OUTSIDE, Curve
from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.mechanisms.anchors.fallback import Worth
from hf_dp_xattn.privacy.bits import SeededEntropy, SystemEntropy
from hf_dp_xattn.privacy.guessing import guess_bound
from hf_dp_xattn.privacy.ledger import Ledger

from .anchor_calibrations import LAYERS, QUALITIES, calibration

ONE = calibration()
ROOT = Path(__file__).resolve().parents[2]


def curve(points: list[tuple[float, float, float, float]], *, up: bool = False) -> Curve:
    found = Curve.of("quality", points, higher_is_better=up)
    assert found is not None
    return found


FALLING = curve([(e, *q[1:]) for e, q in QUALITIES.items()])


def test_interpolation_is_linear_in_log_epsilon_and_spans_both_intervals() -> None:
    at = FALLING.at(2.0)
    assert at.origin == INTERPOLATED
    assert at.value == pytest.approx(0.75)  # 2 is half-way from 1 to 4 in log epsilon
    assert (at.low, at.high) == (0.55, 0.95)
    assert FALLING.at(4.0).origin == MEASURED
    assert (FALLING.at(4.0).low, FALLING.at(4.0).high) == (0.55, 0.65)


@pytest.mark.parametrize(("epsilon", "value"), [(0.1, 0.9), (64.0, 0.2)])
def test_outside_the_range_the_nearest_point_is_flagged_and_no_interval_is_claimed(
    epsilon: float, value: float
) -> None:
    at = FALLING.at(epsilon)
    assert (at.value, at.low, at.high, at.origin) == (value, None, None, OUTSIDE)


def test_wanted() -> None:
    found = FALLING.wanted(0.6)
    assert (found.epsilon, found.surely, found.lowest) == (4.0, 16.0, False)
    between = FALLING.wanted(0.75)
    assert between.epsilon == 2.0 and between.surely == 4.0
    assert FALLING.wanted(0.95).lowest and FALLING.wanted(0.95).epsilon == 1.0
    missed = FALLING.wanted(0.1)
    assert missed.epsilon is None and missed.surely is None
    assert "not reached up to epsilon = 16" in str(missed) and "0.2 at epsilon = 16" in str(missed)


def test_more_budget_never_needs_to_be_worse() -> None:
    """A quality that was reached once stays reached, whatever a later plan does."""
    bumpy = curve([(1, 0.9, 0.9, 0.9), (2, 0.4, 0.4, 0.4), (4, 0.6, 0.6, 0.6), (8, 0.3, 0.3, 0.3)])
    assert bumpy.wanted(0.5).epsilon == pytest.approx(1.75, abs=0.01)
    epsilons = [bumpy.wanted(t).epsilon for t in (0.3, 0.35, 0.4, 0.5, 0.6, 0.9)]
    assert epsilons == sorted(epsilons, reverse=True)  # type: ignore[type-var]
    assert bumpy.wanted(0.3).best_epsilon == 8


@given(
    st.lists(st.floats(0.05, 1.0), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
    st.booleans(),
)
def test_the_smallest_epsilon_reaches_the_target_and_no_smaller_one_does(
    values: list[float], target: float, up: bool
) -> None:
    c = curve([(2.0**i, v, v, v) for i, v in enumerate(values)], up=up)

    def meets(epsilon: float, slack: float) -> bool:
        value = c.at(epsilon).value
        return value >= target - slack if up else value <= target + slack

    found = c.wanted(target).epsilon
    grid = [2.0 ** (i / 16) for i in range(16 * (len(values) - 1) + 1)]
    if found is None:
        assert not any(meets(e, -1e-9) for e in grid)
    else:
        assert meets(found, 0.02)  # it is rounded up to three digits
        assert not any(meets(e, -1e-9) for e in grid if e < found * (1 - 0.011))


def test_points_that_are_no_releases_are_left_out() -> None:
    c = curve([(0.0, 0.1, 0.1, 0.1), (2.0, 0.5, 0.4, 0.6), (math.inf, 0.9, 0.9, 0.9)], up=True)
    assert [p[0] for p in c.points] == [2.0]
    assert Curve.of("x", [], higher_is_better=True) is None


def test_a_plan_of_all_calibrated_epsilons() -> None:
    found = dpx.plan(ONE, measure=False)
    assert [p.epsilon for p in found.points] == [1.0, 4.0, 16.0]
    assert [p.release for p in found.points] == ["sum", "response", "histogram"]
    assert [p.fvu.value for p in found.points] == [0.9, 0.6, 0.2]
    assert [p.score.value for p in found.points if p.score] == [0.3, 0.7, 0.9]
    total, answer, cells = found.points
    assert total.events[0]["kind"] == "gaussian" and total.charged_delta == 1e-5
    assert 0.99 <= total.charged <= 1.0 + 1e-9
    assert answer.events == ({"kind": "pure", "epsilon": "4"},) and answer.charged_delta == 0.0
    assert answer.noise["truth"] == pytest.approx(math.exp(4) / (math.exp(4) + 19), rel=1e-3)
    assert cells.noise["rate_plus"] + cells.noise["rate_minus"] == pytest.approx(16.0)
    assert answer.guesses[0] == (0.5, guess_bound(answer.charged, 0.0, 0.5))
    assert found.reached and found.wanted == ()


def test_rows_and_bytes_by_hand() -> None:
    found = dpx.plan(ONE, measure=False)
    assert [p.rows for p in found.points] == [5, 5, 9]  # slots; slots; 6 anchors and 3 merged groups
    assert [p.kv_bytes for p in found.points] == [r * 2 * (16 + 32) * 2 for r in (5, 5, 9)]
    assert found.exact_kv_bytes == 9 * 2 * 48 * 2 and found.heads == 6
    one = dpx.plan(ONE, measure=False, layers=["up.0"], dtype=torch.float32)
    assert one.points[0].kv_bytes == 5 * 2 * 32 * 4 and (one.layers, one.heads) == (1, 4)


@pytest.mark.parametrize(
    ("release", "unit"),
    [
        *((r, u) for r in ("sum", "response", "histogram") for u in ("row", "group", "context")),
        ("mixed", "row"),
    ],
)
def test_rows_are_never_more_than_predicted(release: str, unit: str) -> None:
    c = calibration(unit=unit, units=1 if unit == "context" else 9, qualities={4.0: (release, 0.5, 0.4, 0.6)})
    found = dpx.plan(c)
    seconds = found.points[0].seconds
    assert seconds is not None and 0 < seconds < 10 and "measured now" in str(found)
    prepared = c.prepare(dpx.DPXAttnConfig(mechanism="anchors", epsilon=4.0, unit=unit))
    groups = torch.arange(9) if unit == "group" else None
    released = prepared.run(torch.randn(9, c.channels), groups=groups, entropy=SeededEntropy(0))
    assert len(released.context.rows) <= found.points[0].rows


def test_the_table() -> None:
    text = str(dpx.plan(ONE, epsilons=[4, 2, 64], want_fvu=0.5, want_score=0.99, measure=False))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[4:7]] == ["2", "4", "64"]
    assert "0.750 ~" in lines[4] and "0.550 to 1.000" in lines[4]
    assert "0.200 !" in lines[6] and "unknown" in lines[6]
    assert "FVU <= 0.5: epsilon = 5.6" in text and "accuracy >= 0.99: not reached up to epsilon = 16" in text
    assert "prior 1/2" in text and "prior 1/100" in text and "prior 10^-6" in text
    assert "nothing was released or charged" in text and "not covered: words" in text
    assert "outside the calibrated range" in text and "interpolated" in text
    assert "time" not in lines[3]
    assert not any(line != line.rstrip() for line in lines)


@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_intervals_cover_what_was_measured_later(unit: str) -> None:
    """Of 300 held-out captions, of combinations that neither the calibration nor the pipeline has seen: at every epsilon."""
    root = Path(__file__).parents[2]
    lines = json.loads((root / "docs/shapes/accuracy.json").read_text())["lines"]
    later = {float(x["epsilon"]): x for x in lines if x["series"] == unit and x["epsilon"][0].isdigit()}
    found = dpx.plan(root / "examples/shapes/calibrations" / unit, measure=False)
    missed = 0
    for point in found.points:
        assert point.score is not None and point.score.low is not None and point.score.high is not None
        assert point.score.low <= later[point.epsilon]["accuracy"] <= point.score.high
        mean = next(
            s for s in _scores(found.calibration, root) if s["epsilon"] == point.epsilon
        )  # of all public contexts together
        missed += not mean["low"] <= later[point.epsilon]["accuracy"] <= mean["high"]
    assert missed >= 3  # what the stored interval of a mean says is not what one context may expect


def _scores(name: str, root: Path) -> list[dict[str, float]]:
    path = root / "examples/shapes/calibrations" / name / "dp_xattn_calibration.json"
    found: list[dict[str, float]] = json.loads(path.read_text())["scores"]
    return found


def test_percentages_are_never_below_the_bound() -> None:
    found = dpx.plan(ONE, measure=False)
    printed = [line for line in str(found).splitlines() if line.rstrip().endswith(" %")]
    assert len(printed) == 3
    for line, point in zip(printed, found.points, strict=True):
        shown = [float(x) / 100 for x in line.replace("%", "").split()[1:]]
        for value, (_, bound) in zip(shown, point.guesses, strict=True):
            assert bound * (1 - 1e-9) <= value <= bound * 1.011
            assert value < 1 or bound > 1 - 1e-6  # what is nearly certain is not called certain


def test_json_round_trip() -> None:
    found = dpx.plan(ONE, epsilon=64.0, want_fvu=0.5, measure=False)
    values = json.loads(found.to_json())
    assert values == found.to_dict()
    assert values["points"][0]["fvu"] == {"value": 0.2, "low": None, "high": None, "origin": OUTSIDE}
    assert values["reached"] is True and values["wanted"][0]["epsilon"] == pytest.approx(5.66, abs=0.01)
    assert values["points"][0]["guesses"][0]["prior"] == 0.5


def test_a_plan_that_is_the_fall_back_shows_what_it_serves() -> None:
    """Neither what the decoder would have been, nor an interpolation with plans that are decoded."""
    made = calibration(
        qualities={1.0: ("sum", 5.0, 4.0, 6.0), 16.0: ("sum", 0.2, 0.1, 0.3)},
        scores={},
        unit="group",
        units=9,
    )
    none, good = made.plans
    worth = Worth("mean", 0.0, "divergence", 1.0, 1.0)
    candidates = [{"epsilon": e, "release": "sum", "fvu": 0.5, "divergence": 2.4} for e in (1.0, 16.0)]
    made = dataclasses.replace(
        made,
        plans=(dataclasses.replace(none, worth=worth), good),
        settings={**made.settings, "candidates": candidates, "nothing": {"mean": 0.3, "none": 0.48}},
    )
    found = dpx.plan(made, epsilons=[1.0, 2.0, 16.0], n=3, measure=False)
    assert [p.serves for p in found.points] == ["the public mean", "the public mean", None]
    assert [p.fvu.value for p in found.points[:2]] == [5.0, 5.0] and found.points[1].fvu.origin == MEASURED
    lines = str(found).splitlines()
    assert all("5.000 =" in line and "the public mean x" in line for line in lines[4:6])
    assert "the public mean" not in lines[6] and " = " not in lines[6]
    text = " ".join(found.notes)
    assert "epsilon 1 gives the public mean, whatever the private context says" in text
    assert "by epsilon: 0.3 at 1, 2.4 at 16 (0.3 for the public mean and 0.48 for no context at all)" in text


@pytest.mark.parametrize(
    ("unit", "release", "epsilon", "advised"),
    [
        ("context", "response", 32.0, True),
        ("context", "response", 64.0, True),
        ("group", "response", 4.0, True),
        ("context", "response", 2.0, False),  # nothing was measured there that bears it out
        ("group", "sum", 32.0, False),
        ("row", "response", 32.0, False),
    ],
)
def test_units_that_answer_for_themselves_are_for_a_library(
    unit: str, release: str, epsilon: float, advised: bool
) -> None:
    made = calibration(
        unit=unit,
        units=1 if unit == "context" else 9,
        qualities={epsilon: (release, 0.5, 0.4, 0.6)},
        scores={},
    )
    found = dpx.plan(made, measure=False)
    assert (
        any(f"at epsilon {epsilon:g} each unit" in n and "mechanism='library'" in n for n in found.notes)
        is advised
    )
    assert (
        found.points[0].release == release
    )  # advised, not swapped: a library is another calibration, of texts


def test_the_plan_of_whole_prompts_says_so_where_it_was_measured() -> None:
    found = str(dpx.plan(ROOT / "examples/shapes/calibrations/context", epsilons=[32.0, 64.0], measure=False))
    assert "at epsilon 32, 64 each unit is answered by itself ('response')" in found
    assert "mechanism='library'" in found and "docs/library.md" in found


def test_without_scores() -> None:
    c = calibration(scores={})
    found = dpx.plan(c, measure=False)
    assert found.score_curve is None and all(p.score is None for p in found.points)
    with pytest.raises(ConfigError, match="want_fvu"):
        dpx.plan(c, want_score=0.5, measure=False)


def test_plot(tmp_path: Path) -> None:
    found = dpx.plan(ONE, epsilons=[2, 8], want_fvu=0.5, want_score=0.99, measure=False)
    path = found.plot(tmp_path / "plan.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    dpx.plan(calibration(scores={}), measure=False).plot(tmp_path / "plan.svg")
    for bad in (tmp_path / "nowhere" / "plan.png", tmp_path / "plan.xyz"):
        with pytest.raises(ConfigError, match="could not be written"):
            found.plot(bad)


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install"):
        dpx.plan(ONE, measure=False).plot(tmp_path / "plan.png")


def test_the_calibration_that_fits_is_used(tmp_path: Path) -> None:
    by_row, by_phrase = tmp_path / "by-row", tmp_path / "by-phrase"
    ONE.save_pretrained(by_row)
    calibration(unit="group", units=6).save_pretrained(by_phrase)
    both = [str(by_row), by_phrase]
    found = dpx.plan(both, unit="group", n=4, measure=False)
    assert (found.calibration, found.unit, found.units) == ("by-phrase", "group", 4)
    assert any("contexts of 6 units" in n for n in found.notes) and found.exact_kv_bytes is None
    assert dpx.plan(both, n=9, measure=False).calibration == "by-row"
    large = [ONE, calibration(units=900)]
    assert dpx.plan(large, n=870, measure=False).calibration == "calibration 2"
    with pytest.raises(ConfigError, match=r"2 calibrations fit.*by-row.*by-phrase"):
        dpx.plan(both, measure=False)


def test_none_fits() -> None:
    for asked in ({"unit": "context"}, {"n": 5000}, {"neighboring": "add_or_remove_one"}):
        with pytest.raises(ConfigError, match=r"(?s)calibration 1 \(unit='row'.*n=9.*dpx\.calibrate"):
            dpx.plan(ONE, **asked)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="none"):
        dpx.plan([])


def test_add_or_remove_one() -> None:
    c = calibration(neighboring="add_or_remove_one", qualities={4.0: ("histogram", 0.5, 0.4, 0.6)})
    found = dpx.plan(c, measure=False).points[0]
    assert found.guesses[0][1] == guess_bound(4.0, 0.0, 0.5, "add_or_remove_one")


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0},
        {"epsilon": math.nan},
        {"epsilons": []},
        {"epsilons": [1.0, -2.0]},
        {"epsilon": 1.0, "epsilons": [1.0]},
        {"unit": "word"},
        {"neighboring": "swap"},
        {"n": 0},
        {"n": True},
        {"delta": 2.0},
        {"want_fvu": math.inf},
        {"want_fvu": -1},
        {"want_score": "high"},
        {"score": "fame"},
        {"layers": ["mid.0"]},
        {"layers": []},
        {"dtype": "int8"},
        {"dtype": "quantum"},
    ],
    ids=str,
)
def test_bad_input(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        dpx.plan(ONE, **bad)  # type: ignore[arg-type]


def test_other_kinds_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="anchors"):
        dpx.plan([3])  # type: ignore[list-item]
    with pytest.raises(ConfigError):
        dpx.plan(tmp_path)
    unknown = tuple(
        dataclasses.replace(p, quality=dataclasses.replace(p.quality, fvu=math.inf)) for p in ONE.plans
    )
    with pytest.raises(ConfigError, match="no predicted quality"):
        dpx.plan(dataclasses.replace(ONE, plans=unknown))


def test_nothing_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a ledger nor the system's entropy is touched, whether the plan is made or refused."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the planner must not do this")

    monkeypatch.setattr(Ledger, "__init__", refuse)
    monkeypatch.setattr(Ledger, "charge_all", refuse)
    monkeypatch.setattr(SystemEntropy, "random_bytes", refuse)
    dpx.plan(ONE, want_fvu=0.5)
    with pytest.raises(ConfigError):
        dpx.plan(ONE, epsilon=-1.0)


def test_a_delta_of_ones_own_is_noted() -> None:
    found = dpx.plan(ONE, delta=1e-7, measure=False)
    assert found.delta == 1e-7 and any("delta = 1e-05" in n for n in found.notes)
    assert found.points[0].noise["sigma"] > dpx.plan(ONE, measure=False).points[0].noise["sigma"]


def test_layers_of_the_builder() -> None:
    assert dpx.plan(ONE, measure=False).layers == len(LAYERS)
