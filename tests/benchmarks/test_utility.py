"""The utility benchmark: baselines against naive twins, FVU against its definition, what "readable" means, and a quick run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for folder in ("examples", "benchmarks"):
    sys.path.insert(0, str(ROOT / folder))

from shapes_utility.baselines import (  # noqa: E402
    Linear,
    ResponsePerRow,
    WienerFilter,
    clip,
    gaussian_sigma,
)
from shapes_utility.fvu import Judge, fvu_interval  # noqa: E402
from shapes_utility.lengths import blockwise  # noqa: E402
from shapes_utility.readable import find_readable  # noqa: E402

from hf_dp_xattn.calibration.anchors.objective import LayerProbe, Objective, fvu  # noqa: E402

ROWS, CHANNELS = 5, 4


def public_rows(count: int = 400, seed: int = 0) -> torch.Tensor:
    """[N, 5, 4]: correlated channels, a mean of its own at every position; the last two rows are copies."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(99))
    rows = torch.randn(count, ROWS, CHANNELS, generator=gen) @ mix
    rows = rows + torch.arange(ROWS)[:, None] * 3.0
    rows[:, -1] = rows[:, -2]
    return rows


def layer(seed: int = 3) -> LayerProbe:
    gen = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, 2, CHANNELS, 3, generator=gen)  # two heads of three channels
    queries = torch.randn(2, 7, 3, generator=gen)

    def project(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.unsqueeze(1) @ key, rows.unsqueeze(1) @ value

    return LayerProbe(project, 3**-0.5, queries, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("joint", [False, True])
def test_wiener_filter_shrinks_to_the_mean_and_to_the_rows(joint: bool) -> None:
    public, private = public_rows(), public_rows(50, seed=1)
    wiener = WienerFilter(public, joint=joint)
    spread = (private - wiener.mean).square().mean()
    nothing = wiener.rows(private, 0.001, seed=0)
    assert (nothing - wiener.mean).square().mean() < 0.01 * spread
    everything = wiener.rows(private, 1e6, seed=0)
    assert (everything - private).square().mean() < 0.01 * spread


def test_wiener_filter_is_the_textbook_one() -> None:
    public = public_rows()
    rows = public - public.mean(0)
    clipped = clip(rows, 2.0)
    noise = 0.7
    observed = clip(public_rows(6, seed=2) - public.mean(0), 2.0)
    found = Linear.fit(clipped, rows, CHANNELS).estimate(observed, noise)
    for p in range(ROWS):
        x, y = rows[:, p].numpy().astype(np.float64), clipped[:, p].numpy().astype(np.float64)
        y_mean = y.mean(0)
        cross = x.T @ (y - y_mean) / len(x)
        inner = (y - y_mean).T @ (y - y_mean) / len(x) + noise**2 * np.eye(CHANNELS)
        expected = (observed[:, p].numpy() - y_mean) @ np.linalg.inv(inner) @ cross.T
        np.testing.assert_allclose(found[:, p].numpy(), expected, atol=2e-4)


def test_gram_matrix_gives_the_same_filter_where_there_are_fewer_contexts_than_numbers() -> None:
    public = public_rows(12).flatten(1).unsqueeze(1)  # 12 contexts of 20 numbers
    rows = public - public.mean(0)
    found = Linear.fit(rows, rows, 11).estimate(rows, 0.5)
    x = rows[:, 0].double()
    expected = x @ torch.linalg.inv(x.T @ x / 12 + 0.25 * torch.eye(20)) @ (x.T @ x / 12)
    torch.testing.assert_close(found[:, 0].double(), expected, atol=1e-3, rtol=1e-3)


def test_joint_filter_uses_that_rows_repeat() -> None:
    public, private = public_rows(2000), public_rows(300, seed=1)
    apart, joint = (WienerFilter(public, joint=j) for j in (False, True))
    error = [(w.rows(private, 8.0, seed=0) - private)[:, -2:].square().mean() for w in (apart, joint)]
    assert error[1] < error[0]


def test_noise_of_the_rows_is_charged_for_replacing_one() -> None:
    """Two neighbours' clipped rows are at most two norms apart; the Gaussian mechanism's classical bound needs about this much."""
    assert 2 * 0.5 < gaussian_sigma(8.0) < gaussian_sigma(1.0) < 2 * np.sqrt(2 * np.log(1.25 / 1e-5))
    assert float(clip(torch.full((3, 4), 9.0), 2.0).norm(dim=-1).max()) <= 2.0 + 1e-6


def test_response_tells_the_truth_as_often_as_it_may() -> None:
    public = public_rows(600)
    method = ResponsePerRow(public, Objective([layer()], torch.zeros(0, CHANNELS)), 16)
    cells = torch.randint(0, 16, (200, 100), generator=torch.Generator().manual_seed(0))
    for epsilon in (0.5, 3.0):
        told, response = method.answers(cells, epsilon, seed=1)
        truth = np.exp(epsilon) / (np.exp(epsilon) + 15)
        assert abs(response.truth - truth) < 1e-3
        assert abs(float((told == cells).double().mean()) - truth) < 5 * np.sqrt(
            truth * (1 - truth) / cells.numel()
        )
        others = torch.bincount((told - cells)[told != cells] % 16, minlength=16)[1:].double()
        assert (others / others.mean() - 1).abs().max() < 0.25


def test_response_rows_are_posterior_means() -> None:
    public, private = public_rows(600), public_rows(40, seed=1)
    method = ResponsePerRow(public, Objective([layer()], torch.zeros(0, CHANNELS)), 8)
    cells = method.quantizer.cells(private.flatten(0, 1)).view(private.shape[:2])
    told, response = method.answers(cells, 1.5, seed=4)
    found = method.rows(private, 1.5, seed=4)
    false = (1 - response.truth) / 7
    for i, p in np.ndindex(*told.shape):
        likelihood = torch.full((8,), false)
        likelihood[told[i, p]] = response.truth
        posterior = method.prior[p] * likelihood
        torch.testing.assert_close(
            found[i, p], posterior / posterior.sum() @ method.anchors, atol=1e-4, rtol=1e-4
        )
    torch.testing.assert_close(
        method.rows(private, 1e-6, 0), method.mean.expand_as(private), atol=1e-3, rtol=1e-3
    )
    assert torch.equal(
        method.rows(private, 30.0, 0).round(decimals=3), method.anchors[cells].round(decimals=3)
    )


def test_blockwise_releases_every_caption_of_a_context() -> None:
    public = public_rows()
    wiener = WienerFilter(public, joint=False)
    private = public_rows(6, seed=5).reshape(2, 3 * ROWS, CHANNELS)
    close = blockwise(wiener, private, 1e6, 0)
    assert close.shape == private.shape
    assert (close - private).abs().mean() < 0.05 * private.std()


def test_fvu_is_the_objectives_and_own_queries_have_their_own_variance() -> None:
    probe, whole = layer(), public_rows(6)
    own = [torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(5))]
    against = Judge([probe], whole, own)
    decoded = public_rows(6, seed=8)

    class Rows:
        def __init__(self, rows: torch.Tensor) -> None:
            self.rows = rows

        def attend(self, layer: int, query: torch.Tensor) -> torch.Tensor:
            return probe.attend(self.rows.unsqueeze(0), query)[0]

    errors = against.errors([Rows(r) for r in decoded])
    summary = against.summary([errors])
    out, exact = (probe.attend(x, probe.queries).double() for x in (decoded, whole))
    gain = probe.gain.double()
    error = ((out - exact).square().sum((2, 3)) * gain).unsqueeze(1)
    variance = ((exact - exact.mean(0)).square().sum((2, 3)) * gain).unsqueeze(1)
    assert summary["other"]["fvu"] == pytest.approx(fvu(error, variance), rel=1e-4)
    expected = 0.0
    for i in range(6):
        at_own = probe.attend(whole, own[0][i]).double()
        expected += float(((at_own[i] - at_own.mean(0)).square().sum((1, 2)) * gain).sum())
    assert float(against.variances["own"].sum()) == pytest.approx(expected, rel=1e-6)
    perfect = against.summary([against.errors([Rows(r) for r in whole])])
    assert perfect["own"]["fvu"] < 1e-8 and perfect["other"]["fvu"] < 1e-8


def test_readable_is_from_where_accuracy_stays_halfway() -> None:
    def at(epsilon: float, accuracy: float) -> dict[str, float]:
        return {"epsilon": epsilon, "accuracy": accuracy, "low": accuracy - 0.05, "high": accuracy + 0.05}

    public, plain = at(0, 0.2), at(0, 1.0)
    lines = [at(8, 0.7), at(1, 0.25), at(2, 0.65), at(4, 0.5), at(16, 0.9)]
    found = find_readable(lines, public, plain)
    assert (found.readable, found.below, found.above_public, found.largest) == (8, 4, 2, 16)
    nothing = find_readable(lines[1:2], public, plain)
    assert (nothing.readable, nothing.below, nothing.above_public) == (None, 1, None)


@pytest.mark.slow
def test_quick_run(tmp_path: Path) -> None:
    """End to end with tiny sizes: results of all parts, plots and the page; and the page again from the results alone."""
    out = tmp_path / "utility"
    command = [sys.executable, "benchmarks/utility.py", "--out", str(out)]
    subprocess.run([*command, "--quick"], cwd=ROOT, check=True, capture_output=True)
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {"a", "b", "c", "d"}
    by_name = {(v["method"], v["epsilon"]): v for v in results["a"]["lines"]}
    assert by_name["exact", None]["other"]["fvu"] < 1e-6
    assert 0.5 < by_name["public_mean", None]["other"]["fvu"] < 1.5
    assert {m for m, _ in by_name} >= {"anchors", "kernel_sum", "dptree", "wiener", "wiener_joint"}
    assert by_name["anchors", 64.0]["own"]["fvu"] < by_name["anchors", 1.0]["own"]["fvu"]
    assert len(by_name["anchors", 8.0]["other"]["heads"]) == len(results["a"]["layers"])
    page = (tmp_path / "utility.md").read_text()
    plots = sorted(p.name for p in out.glob("*.png"))
    assert plots == ["attributes.png", "fvu_other.png", "fvu_own.png", "fvu_rows.png"]
    assert all(f"(utility/{name})" in page for name in plots)
    assert "nan" not in page
    subprocess.run([*command, "--write-only"], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "utility.md").read_text() == page


def test_interval_holds_the_estimate() -> None:
    g = torch.Generator().manual_seed(0)
    errors, variances = (
        torch.rand(200, 3, 2, generator=g).double(),
        torch.rand(200, 3, 2, generator=g).double(),
    )
    low, high = fvu_interval(errors, variances)
    assert low < fvu(errors, variances) < high
    assert high - low < 0.3
