"""Posterior weights against Bayes' rule in plain Python; pruning keeps the mass and the mean."""

from __future__ import annotations

import pytest
import torch

from hf_dp_xattn.mechanisms.anchors.cells import CellDecoder

from .naive_anchors import CELLS, CHANNELS, CODE, cell_decoder, gen, naive_weights, tilt


@pytest.mark.parametrize("joint", [False, True], ids=["per cell", "tilted"])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (3.0, 0.7)], ids=["symmetric", "asymmetric"])
def test_weights_match_bayes(rates: tuple[float, float], joint: bool) -> None:
    decoder, codes = cell_decoder(), torch.randn(CELLS, CODE, generator=gen(5))
    noised = torch.randint(-2, 7, (CELLS,), generator=gen(6)).float()
    own = tilt() if joint else None
    weights = decoder.weights(noised, rates, codes, own)
    expected = naive_weights(decoder, noised, rates, codes, own)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_at_small_epsilon_the_weights_are_the_prior() -> None:
    decoder, codes = cell_decoder(), torch.randn(CELLS, CODE, generator=gen(5))
    noised = torch.randint(-500, 500, (CELLS,), generator=gen(6)).float()
    prior = decoder.log_prior.exp() @ decoder.support
    torch.testing.assert_close(decoder.weights(noised, (1e-7, 1e-7), codes), prior, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_cell", [1, 2], ids=lambda a: f"a={a}")
def test_decode_keeps_mass_and_mean(per_cell: int) -> None:
    decoder = cell_decoder(per_cell=per_cell)
    weights = torch.rand(CELLS, generator=gen(7)) ** 4
    context = decoder.decode(weights)
    mass = context.log_weights.exp()
    assert context.rows.shape == (decoder.rows * per_cell + 3, CHANNELS)
    torch.testing.assert_close(mass.sum(), weights.sum())
    mean = (decoder.anchors.mean(1) * weights[:, None]).sum(0)
    torch.testing.assert_close((context.rows * mass[:, None]).sum(0), mean, rtol=1e-4, atol=1e-5)
    heaviest = int(weights.argmax())
    assert any(torch.equal(r, decoder.anchors[heaviest, 0]) for r in context.rows)


def test_all_cells_fit() -> None:
    decoder = cell_decoder(rows=CELLS)
    context = CellDecoder.decode(decoder, torch.ones(CELLS))
    assert context.rows.shape[0] == CELLS
