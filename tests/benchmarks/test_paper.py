"""benchmarks/paper.py: slopes, counts, the whole command at tiny sizes; nothing is printed where answers are wrong."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import paper
from paper_parts import common, costs, errors, growing
from paper_parts.common import KERNEL, MECHANISMS, QUICK, TREE


def test_slopes_and_their_intervals() -> None:
    rng = np.random.default_rng(0)
    x = [1.0, 2.0, 4.0, 8.0]
    found = common.fit(x, [np.abs(rng.normal(size=400)) / v for v in x])
    assert found["low"] <= -1.0 <= found["high"] and abs(found["slope"] + 1.0) < 0.15
    assert 0.02 < found["high"] - found["low"] < 0.3
    assert abs(common.fit(x, [[v**2] for v in x])["slope"] - 2.0) < 1e-9


def test_numbers_released_are_counted_on_a_release() -> None:
    for d, dv, bins in ((2, 1, 1), (3, 2, 8), (4, 4, 16)):
        data = common.rows(8, d, dv)
        assert costs.count_released(data, bins) == costs.numbers(data, TREE, bins)
        structure = common.release(data, common.config(KERNEL, 1.0))
        assert structure.sums.numel() == costs.numbers(data, KERNEL, bins)


def test_rows_are_within_the_declared_bounds() -> None:
    for bound in (0.25, 1.0, 1.5):
        data = common.rows(500, 4, 3, bound=bound)
        for x in (data.key, data.query):
            assert float(x.square().sum(-1).max()) * data.scale <= bound
        assert float(data.value.min()) >= 0 and float(data.value.max()) <= 1


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_wrong_answers_print_nothing(mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = common.rows(50, 4, 4)
    common.check_answers(data)
    original = common.release

    def wrong(rows: common.Rows, settings: object, seed: int | None = None) -> object:
        structure = original(rows, settings, seed)  # type: ignore[arg-type]
        if settings.mechanism == mechanism:  # type: ignore[attr-defined]
            structure.sums[..., :-1] *= 3
        return structure

    monkeypatch.setattr(common, "release", wrong)
    with pytest.raises(SystemExit, match=mechanism):
        common.check_answers(data)


def test_noise_of_sums_is_that_of_the_release() -> None:
    """The numerators' noise at a query is sigma |phi(q)|."""
    data = common.rows(64, 2, 2, queries=32)
    prepared = common.prepare(data, common.config(KERNEL, 1.0))
    structure = common.release(data, common.config(KERNEL, 1.0), 0)
    phi = (
        structure.features.monomials((structure.query_map @ data.query[0].mT).mT)
        * structure.features.coefficients()
    )  # type: ignore[attr-defined]
    expected = prepared.sigma * float(phi.square().sum(-1).mean().sqrt())
    measured = common.root_mean_square(errors.sums_noise(data, KERNEL, 60))
    assert abs(measured / expected - 1) < 0.25


def test_growth_is_measured_against_its_prediction() -> None:
    found = growing.growth(QUICK)
    for point in found["points"]:
        for name in ("tree", "square_root"):
            p = point[name]
            assert 0.3 < p["mean_measured"] / p["mean_predicted"] < 2.0
            assert p["largest_measured"] <= p["largest_bound"]
        assert abs(point["naive"]["mean_measured"] / point["x"] ** 0.5 - 1) < 0.5
    assert found["points"][-1]["chosen"] == "square_root"


@pytest.mark.slow
def test_the_command_writes_results_figures_and_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["paper.py", "--quick", "--out", str(tmp_path / "paper")])
    torch.manual_seed(0)
    paper.main()
    results = json.loads((tmp_path / "paper/results.json").read_text())
    assert set(results) == {*paper.PARTS, "meta"}
    text = (tmp_path / "paper.md").read_text()
    for name in re.findall(r"\]\(paper/([a-z_.]+)\)", text):
        assert (tmp_path / "paper" / name).is_file(), name
    assert "nan" not in text and "inf" not in text.replace("infinite", "")
