"""The best guess of a canary, against laws for which its success is known, and against the bound that the guarantee gives."""

from __future__ import annotations

import math

import pytest
import torch

from hf_dp_xattn import ConfigError, DPXAttnConfig
from hf_dp_xattn.audit.audit_report import FAIL, PASS
from hf_dp_xattn.audit.extraction import extract, play, verdict
from hf_dp_xattn.audit.laws import Context, Law
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.guessing import guess_bound

from ..mechanisms.anchors.naive_anchors import CHANNELS, decoders, gen, plan
from .hosts import case

TRIALS = 4000
# |rate - p| exceeds this with probability at most 2 exp(-2 n t^2) < 10^-6 (Hoeffding)
TOLERANCE = math.sqrt(math.log(2e6) / (2 * TRIALS))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def law(kind: str, epsilon: float) -> tuple[Law, DPXAttnConfig]:
    config = DPXAttnConfig(unit="row", mechanism="anchors", epsilon=epsilon)
    return Law(prepare_anchors(config, [plan(kind)], decoders(kind))), config


def rows_in_different_cells(found: Law, count: int) -> list[Context]:
    contexts: dict[int, Context] = {}
    for seed in range(2000):
        row = Context(torch.randn(1, CHANNELS, generator=gen(seed)) * 3)
        contexts.setdefault(int(found.views([row]).integers[0, 0, 0]), row)  # type: ignore[attr-defined]
        if len(contexts) == count:
            return list(contexts.values())
    raise AssertionError


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 5.0], ids=lambda e: f"eps={e:g}")
@pytest.mark.parametrize("k", [2, 4], ids=lambda k: f"k={k}")
def test_randomised_response_is_read_as_well_as_can_be(k: int, epsilon: float) -> None:
    """An answer that names a candidate is believed; any other one leaves a guess among all of them."""
    found, config = law("response", epsilon)
    contexts = rows_in_different_cells(found, k)
    truth = math.exp(epsilon) / (math.exp(epsilon) + 19)  # of 20 cells
    named = truth + (k - 1) * (1 - truth) / 19
    result = play(found, contexts, config, units=1, trials=TRIALS, entropy=SeededEntropy(1))
    assert result.rate == pytest.approx(truth + (1 - named) / k, abs=TOLERANCE)
    assert result.bound == guess_bound(epsilon, config.delta, 1 / k)
    assert result.low <= result.rate <= result.high and verdict(result).verdict == PASS


def test_gaussian_noise_is_read_as_well_as_can_be() -> None:
    """Two candidates at distance d: right with probability Phi(d / (2 sigma))."""
    found, config = law("sum", 4.0)
    contexts = [Context(torch.randn(1, CHANNELS, generator=gen(seed))) for seed in (0, 1)]
    views = found.views(contexts)
    distance = views.gap(0, 1) * found.prepared.numbers.sensitivity
    expected = 0.5 * math.erfc(-distance / (2 * found.prepared.numbers.sigma) / math.sqrt(2))
    result = play(found, contexts, config, units=1, trials=TRIALS, entropy=SeededEntropy(2))
    assert 0.55 < expected < 0.99
    assert result.rate == pytest.approx(expected, abs=TOLERANCE)


def test_the_same_context_twice_is_guessed_by_chance() -> None:
    found, config = law("histogram", 8.0)
    row = Context(torch.zeros(1, CHANNELS))
    result = play(found, [row] * 4, config, units=1, trials=TRIALS, entropy=SeededEntropy(3))
    assert result.rate == pytest.approx(0.25, abs=TOLERANCE)


def test_more_than_the_guarantee_allows_is_a_failure() -> None:
    found, config = law("response", 8.0)
    contexts = rows_in_different_cells(found, 2)
    claims = config.replace(epsilon=0.1)
    result = play(found, contexts, claims, units=1, trials=TRIALS, entropy=SeededEntropy(4))
    assert verdict(result).verdict == FAIL


def test_candidates_that_differ_in_many_units_are_bounded_by_group_privacy() -> None:
    found, config = law("sum", 0.01)
    contexts = [Context(torch.randn(3, CHANNELS, generator=gen(seed))) for seed in (0, 1)]
    result = play(found, contexts, config, units=3, trials=100, entropy=SeededEntropy(5))
    three = guess_bound(0.03, config.delta * 3 * math.exp(0.02), 0.5)
    assert result.bound == pytest.approx(three) and result.bound > guess_bound(0.01, config.delta, 0.5)


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("pipeline anchors", 15),
        ("inpaint dptree", 15),
        ("llama kernel_sum group", 1),
        ("gpt2 kernel_sum context", 1),
    ],
)
def test_of_a_host(name: str, units: int) -> None:
    subject = case(name)
    found = extract(subject, subject.canaries(3), trials=60)
    assert found.candidates == 3 and found.units == units and verdict(found).verdict == PASS
    assert subject.handle is None


def test_candidates_that_a_host_cannot_tell_apart_are_refused() -> None:
    subject = case("pipeline anchors")
    with pytest.raises(ConfigError, match="same context"):
        extract(subject, subject.from_texts(["a dog", "a  dog"]), trials=60)
    with pytest.raises(ConfigError, match="two candidates"):
        extract(subject, subject.canaries(1), trials=60)
