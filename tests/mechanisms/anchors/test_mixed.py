"""Release "mixed": composition, the decoder against a naive twin, its fall-back, what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dp_xattn import ConfigError, DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.mixed import HISTOGRAM_SHARE, AnchorMixed
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.mechanisms.growing_release import grow
from hf_dp_xattn.privacy.accountant import GaussianEvent, PureEvent, epsilon_of, gaussian_sigma_squared
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.ledger import Budget, Ledger

from .naive_anchors import (
    CELLS,
    CHANNELS,
    CODE,
    cell_decoder,
    decoders,
    gen,
    naive_shift,
    naive_weights,
    plan,
    row_move,
)
from .noised import code_of

N = 40


def rows(seed: int = 0, n: int = N) -> torch.Tensor:
    return torch.randn(n, CHANNELS, generator=gen(seed))


def prepare(epsilon: float = 4.0, **changes: object) -> AnchorMixed:
    config = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=epsilon).replace(**changes)
    prepared = prepare_anchors(config, [plan("mixed")], decoders("mixed"))
    assert isinstance(prepared, AnchorMixed)
    return prepared


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.3, 1.0, 7.0, 11.1], ids=lambda e: f"eps={e:g}")
def test_both_events_are_charged_and_fit_the_budget(epsilon: float) -> None:
    prepared = prepare(epsilon)
    pure, gaussian = prepared.events
    assert isinstance(pure, PureEvent) and isinstance(gaussian, GaussianEvent)
    assert pure.epsilon == Fraction(epsilon) * HISTOGRAM_SHARE  # exact, as a rational
    assert epsilon_of([pure], 0.0) <= math.nextafter(epsilon * 0.75, math.inf)
    assert epsilon_of(prepared.events, 1e-5) <= epsilon
    # replace_one: two vectors of the unit ball are two radii apart
    assert gaussian.sensitivity == 2 * prepared.sum.bound
    ledger = Ledger()
    ledger.charge(ledger.digest([b"context"]), prepared.events, Budget(epsilon, 1e-5))


@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0], ids=lambda e: f"eps={e:g}")
def test_an_independent_accountant_agrees(epsilon: float) -> None:
    """Privacy loss distributions of dp_accounting: randomised response for the counts, the Gaussian mechanism for the sum."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    pure, gaussian = prepare(epsilon).events
    assert isinstance(pure, PureEvent) and isinstance(gaussian, GaussianEvent)
    ratio = math.sqrt(gaussian.sigma_squared) / gaussian.sensitivity
    counts = pld.from_privacy_parameters(
        pld.common.DifferentialPrivacyParameters(float(pure.epsilon), 0.0), value_discretization_interval=1e-3
    )
    total = counts.compose(pld.from_gaussian_mechanism(ratio, value_discretization_interval=1e-3))
    assert total.get_epsilon_for_delta(1e-5) <= epsilon


def test_the_sum_takes_about_the_noise_that_basic_composition_gives() -> None:
    """Never much more: the joint accounting may not cost utility beside eps_h + eps_s."""
    s = prepare(8.0)
    alone = math.sqrt(gaussian_sigma_squared(2.0, 1e-5, 2 * s.sum.bound))
    assert math.sqrt(s.sum.sigma_squared) < 1.1 * alone


@pytest.mark.parametrize("epsilon", [0.8, 3.0], ids=lambda e: f"eps={e:g}")
def test_joint_loss_by_enumeration(epsilon: float) -> None:
    """Every pair of neighbours on 3 cells and codes in {-1, 0, 1}: the joint density ratio over a grid of outcomes, summed to delta(eps).

    The noise of the very events that `prepare` made, at lattice step 1 (sums) and 1 (counts).
    """
    pure, gaussian = prepare(epsilon).events
    assert isinstance(pure, PureEvent) and isinstance(gaussian, GaussianEvent)
    plus, minus = float(pure.epsilon) * 0.75, float(pure.epsilon) * 0.25
    sigma = 2 * math.sqrt(gaussian.sigma_squared) / gaussian.sensitivity
    reach = range(-12, 13)
    tail = range(-math.ceil(9 * sigma) - 2, math.ceil(9 * sigma) + 3)

    def geometric(z: int) -> float:
        return math.exp(-plus * z) if z >= 0 else math.exp(minus * z)

    mass = sum(geometric(z) for z in range(-400, 401))
    normal = sum(math.exp(-z * z / (2 * sigma * sigma)) for z in tail)
    # cells a != b: the count loss takes few values; its distribution under the first neighbour
    losses: dict[float, float] = defaultdict(float)
    for za, zb in product(range(-400, 401), reach):
        p = geometric(za) * geometric(zb) / mass**2
        q = geometric(za + 1) * geometric(zb - 1) / mass**2
        losses[round(math.log(p / q), 9)] += p
    assert max(abs(v) for v in losses) <= float(pure.epsilon) + 1e-8
    for move in (-2, 1, 2):  # codes differ by at most 2
        delta = 0.0
        for loss, p in losses.items():
            for w in tail:
                density = p * math.exp(-w * w / (2 * sigma * sigma)) / normal
                total = loss + ((w - move) ** 2 - w * w) / (2 * sigma * sigma)
                delta += density * max(0.0, 1.0 - math.exp(epsilon - total))
        assert delta <= 1e-5


def test_without_noise_the_code_is_the_naive_one() -> None:
    prepared = prepare(200.0)
    s, p, x = prepared, plan("mixed"), rows()
    counts, total, n = code_of(prepared, x, SeededEntropy(0)).split([CELLS, CODE, 1])
    z = (x - p.center) @ p.matrix.T + p.bias
    assert torch.equal(counts.long(), torch.bincount(torch.cdist(z, p.codes[0]).argmin(1), minlength=CELLS))
    z = 0.4 * z
    expected = (z / z.norm(dim=-1, keepdim=True).clamp_min(1.0)).sum(0)
    assert 6 * s.sum.sigma < 2.0
    torch.testing.assert_close(total.float(), expected, rtol=0, atol=6 * s.sum.sigma)
    assert float(n) == N


@pytest.mark.parametrize("epsilon", [1.0, 8.0], ids=lambda e: f"eps={e:g}")
def test_decoder_matches_the_naive_one(epsilon: float) -> None:
    prepared = prepare(epsilon)
    s, p = prepared, plan("mixed")
    code = code_of(prepared, rows(), SeededEntropy(1))
    weights = naive_weights(cell_decoder(), code[:CELLS].float(), s.histogram.rates, p.codes[0], None)
    shift = naive_shift(row_move(), code[CELLS:-1] / N, weights, s.sum.sigma / N)
    plain = cell_decoder().decode(torch.tensor(weights))
    found = s.decoded(code)
    torch.testing.assert_close(found.log_weights, plain.log_weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.rows, plain.rows + shift.float(), rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_more_noise_moves_less(seed: int, noise: float) -> None:
    """In the norm that the moment gives, a larger noise never moves the anchors further; at infinite noise not at all."""
    move = row_move(seed)
    move = dataclasses.replace(move, cross=torch.linalg.cholesky(move.moment).mT.contiguous())
    code, weights = torch.randn(CODE, generator=gen(seed)), torch.rand(CELLS, generator=gen(seed + 1))
    near, far = (float(move.shift(code, weights, s).norm()) for s in (noise, 2 * noise))
    assert far <= near * (1 + 1e-5)
    assert float(move.shift(code, weights, 1e9).norm()) < 1e-6


def test_small_epsilon_falls_back_to_the_public_mean() -> None:
    """The rows that are left are those of the prior's weights."""
    prepared = prepare(1e-3)
    prior = cell_decoder().log_prior.exp() @ cell_decoder().support
    public = cell_decoder().decode(prior).pruned()
    found = prepared.run(rows(), entropy=SeededEntropy(3)).context

    def mean(rows: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
        return torch.softmax(log_weights, 0) @ rows

    spread = float(cell_decoder().anchors.std())
    distance = mean(found.rows, found.log_weights) - mean(public.rows, public.log_weights)
    assert float(distance.abs().max()) < 0.02 * spread


@pytest.mark.parametrize(
    "changes", [{"unit": "group"}, {"unit": "context"}, {"neighboring": "add_or_remove_one"}], ids=str
)
def test_other_units_and_relations_are_refused_by_name(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"mixed.*{next(iter(changes.values()))}"):
        prepare(**changes)


def test_a_growing_context_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="mixed"):
        grow(prepare(), 8, units=N)


def test_no_move_no_release() -> None:
    with pytest.raises(ConfigError, match="calibrate again"):
        prepare_anchors(
            DPXAttnConfig(unit="row", mechanism="anchors"),
            [plan("mixed")],
            Decoders(None, cell_decoder(), None),
        )
