"""FVU against a naive twin; what exact rows and the public mean score."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from hf_dp_xattn.calibration.anchors.judge import counted
from hf_dp_xattn.calibration.anchors.objective import Moved, fvu
from hf_dp_xattn.hosts.transformers.decoder_only.public_prefixes import SoftmaxProbe

from .synthetic_contexts import CHANNELS, ROWS, contexts, objective


def naive_output(
    layer: object, rows: torch.Tensor, weights: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """[H, m, d] with an explicit softmax over weighted rows."""
    key, value = layer.project(rows.unsqueeze(0))  # type: ignore[attr-defined]
    logits = query @ key[0].mT * layer.scale  # type: ignore[attr-defined]
    p = weights * torch.exp(logits)
    return (p / p.sum(-1, keepdim=True)) @ value[0]


@pytest.mark.parametrize("public", [0, 2], ids=lambda p: f"p={p}")
def test_measure_matches_the_naive_twin(public: int) -> None:
    goal, data = objective(public=public), contexts(5)
    whole = data.whole.float()
    g = torch.Generator().manual_seed(0)
    decoded = [
        (torch.randn(3 + i % 2, CHANNELS, generator=g), torch.randn(3 + i % 2, generator=g)) for i in range(5)
    ]
    errors, variances = goal.measure(whole, decoded, queries=7, seed=3)
    g = torch.Generator().manual_seed(3)
    for j, layer in enumerate(goal.layers):
        q = layer.queries[:, torch.randint(0, 64, (7,), generator=g)]
        exact = torch.stack([naive_output(layer, w, torch.ones(ROWS), q) for w in whole])
        for i, (rows, log_weights) in enumerate(decoded):
            both = torch.cat([goal.public_rows, rows])
            weights = torch.cat([torch.ones(public), log_weights.exp()])
            out = naive_output(layer, both, weights, q)
            expected = ((out - exact[i]) ** 2).sum((1, 2)) * layer.gain
            torch.testing.assert_close(errors[i, j], expected.double(), rtol=1e-3, atol=1e-4)
            spread = ((exact[i] - exact.mean(0)) ** 2).sum((1, 2)) * layer.gain
            torch.testing.assert_close(variances[i, j], spread.double(), rtol=1e-3, atol=1e-4)


def test_exact_rows_leave_nothing_unexplained() -> None:
    goal, data = objective(public=0), contexts(20)
    decoded = [(w.float(), torch.zeros(ROWS)) for w in data.whole]
    assert fvu(*goal.measure(data.whole.float(), decoded)) < 1e-8


def test_losses_agree_with_measure() -> None:
    goal, data = objective(public=0), contexts(64)
    rows = data.whole.float() + 0.2 * torch.randn(
        64, ROWS, CHANNELS, generator=torch.Generator().manual_seed(1)
    )
    losses = goal.losses(
        data.whole.float(),
        rows,
        torch.zeros(64, ROWS),
        queries=64,
        layers=2,
        generator=torch.Generator().manual_seed(0),
    )
    measured = fvu(*goal.measure(data.whole.float(), [(r, torch.zeros(ROWS)) for r in rows], queries=64))
    assert float(losses.mean()) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "capped"])
def test_moved_rows_are_projected_as_rows_are(softcap: float | None) -> None:
    """Slots and directions, combined, against every row by itself; public rows before them, whatever a layer does with its logits."""
    goal, data, g = objective(public=2), contexts(6), torch.Generator().manual_seed(4)
    if softcap is not None:
        own = [SoftmaxProbe(p.project, p.scale, p.queries, p.gain, softcap) for p in goal.layers]
        goal = dataclasses.replace(goal, layers=own)
    slots, directions, moves = (
        torch.randn(*s, generator=g) for s in ((5, CHANNELS), (3, CHANNELS), (6, 5, 3))
    )
    moved, weights = Moved(slots, moves, directions), torch.randn(6, 5, generator=g)
    assert goal.affine(slots)
    found = []
    for rows in (moved, slots + moves @ directions):
        again = torch.Generator().manual_seed(0)
        found.append(goal.losses(data.whole.float(), rows, weights, queries=8, layers=2, generator=again))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_a_projection_with_a_norm_is_not_affine() -> None:
    goal = objective()

    def normed(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = goal.layers[0].project(rows)
        return F.normalize(key + 1.0, dim=-1), value

    layers = [dataclasses.replace(goal.layers[0], project=normed), goal.layers[1]]
    assert not dataclasses.replace(goal, layers=layers).affine(contexts(2).whole[0].float())


def test_intervals_of_few_kinds_are_wider() -> None:
    units, widened = counted(torch.arange(30) % 3)
    assert len(torch.unique(units)) == 30 and widened == pytest.approx((1 + 0.5 * 9) ** 0.5)
    units, widened = counted(torch.arange(30) % 5)
    assert len(torch.unique(units)) == 5 and widened == 1.0
