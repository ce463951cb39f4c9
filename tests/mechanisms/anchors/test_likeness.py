"""Whether a release looks like public ones: the statistic against a naive twin, what it tells apart, and that it reads nothing private."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_dp_xattn.calibration.anchors.likeness_fit import fit_likeness, outside, with_limits
from hf_dp_xattn.config import DPXAttnConfig
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.fallback import Fallback, Worth
from hf_dp_xattn.mechanisms.anchors.likeness import Likeness
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.privacy.bits import SeededEntropy

from .naive_anchors import CHANNELS, decoders, gen, plan
from .noised import code_of

WIDTH, TOPICS, NOISE = 12, 3, 0.5
MEAN = Fallback(torch.randn(3, CHANNELS, generator=gen(3)), torch.randn(3, generator=gen(4)))


def public(count: int, seed: int, *, topics: float = 1.0) -> torch.Tensor:
    """[N, WIDTH] codes without noise."""
    directions = 3.0 * torch.randn(TOPICS, WIDTH, generator=gen(1))
    return 2.0 + topics * torch.randn(count, TOPICS, generator=gen(seed)) @ directions


def noised(codes: torch.Tensor, seed: int, scale: float = NOISE) -> torch.Tensor:
    return codes + scale * torch.randn(codes.shape, generator=gen(seed))


@pytest.fixture(scope="module")
def likeness() -> Likeness:
    codes = public(600, 2)
    found = fit_likeness(noised(codes, 3), noised(codes, 4))
    assert found is not None
    statistic = found.statistic(noised(public(400, 5), 6))
    low, high = torch.quantile(statistic, torch.tensor([0.02, 0.98])).tolist()
    return with_limits(found, low, high)


def naive(likeness: Likeness, features: torch.Tensor, ratio: float) -> float:
    over, under = 0.0, 0.0
    for axis, share in zip(likeness.axes, likeness.noise.tolist(), strict=True):
        z = float((features - likeness.center) @ axis)
        variance = (1 - share) + share * ratio
        weight = (1 - share) / variance
        over += weight * z * z / variance
        under += weight
    return over / under


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_statistic_is_that_of_the_naive_twin(likeness: Likeness, ratio: float) -> None:
    features = noised(public(5, 7), 8)
    found = likeness.statistic(features, ratio).tolist()
    assert found == pytest.approx([naive(likeness, f, ratio) for f in features], rel=1e-4)


def test_one_on_average_and_only_directions_that_say_something(likeness: Likeness) -> None:
    fresh = likeness.statistic(noised(public(2000, 9), 10))
    assert float(fresh.mean()) == pytest.approx(1.0, abs=0.15)
    assert TOPICS <= len(likeness.noise) <= TOPICS + 2  # noise alone gave no direction, but by chance


def test_noise_of_another_epsilon_is_allowed_for(likeness: Likeness) -> None:
    scale = 4.0
    wide = noised(public(2000, 11), 12, scale * NOISE)
    assert float(likeness.statistic(wide, scale**2).mean()) == pytest.approx(1.0, abs=0.2)


def test_too_little_and_too_much_are_told(likeness: Likeness) -> None:
    def missed(codes: torch.Tensor) -> float:
        return float(outside(likeness, likeness.statistic(noised(codes, 14))).float().mean())

    assert missed(public(1000, 13)) < 0.1
    assert missed(public(1000, 13, topics=0.02)) > 0.9
    assert missed(public(1000, 13, topics=8.0)) > 0.8


def test_releases_that_tell_nothing_have_no_likeness() -> None:
    same = torch.zeros(800, WIDTH)
    assert fit_likeness(noised(same, 15), noised(same, 16)) is None


@pytest.mark.parametrize("release", ["sum", "response", "histogram", "mixed"])
def test_it_is_post_processing(release: str) -> None:
    """Two contexts with one release give equal bits, whether it is taken for a public one or not; and both happen."""
    config = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=4.0)
    parts = decoders("mixed" if release == "mixed" else "")
    parts = Decoders(parts.slots, parts.cells, parts.move, MEAN)
    own = dataclasses.replace(plan(release), worth=Worth("mean", 1.0, "fvu", 0.8, 0.9))
    rows = torch.randn(9, CHANNELS, generator=gen(7))
    prepared = prepare_anchors(config, [own], parts)
    features = torch.stack(
        [
            prepared.features(code_of(prepared, s * rows, SeededEntropy(i)))
            for i, s in enumerate((1.0, 0.3, 2.0, -1.0) * 8)
        ]
    )
    center, size = features.mean(0), features.shape[1]
    axes = torch.eye(size) / features.std(0).clamp_min(1e-6)
    base = Likeness(center, axes, torch.zeros(size), torch.tensor(0.0), torch.tensor(1e9))
    statistic = base.statistic(features)
    decoded = []
    for high in (float(statistic.max()) + 1.0, float(statistic.min()) / 2):
        gate = dataclasses.replace(base, high=torch.tensor(high))
        held = prepare_anchors(config, [dataclasses.replace(own, likeness=gate)], parts)
        noised_integers = held.noise(held.exact(rows, None), SeededEntropy(0))
        content = held.decode(noised_integers, held.state(9, 9))
        # nothing but the noised integers and the public count goes in
        again = prepare_anchors(config, [dataclasses.replace(own, likeness=gate)], parts)
        other = again.decode(tuple(t.clone() for t in noised_integers), again.state(9, 9))
        assert torch.equal(content.rows, other.rows) and torch.equal(content.log_weights, other.log_weights)
        assert held.events == prepared.events  # and it costs nothing
        decoded.append(content)
    assert torch.equal(decoded[1].rows, MEAN.rows) and decoded[0].rows.shape != MEAN.rows.shape
