"""Audits of releases: at the right noise nothing is found, and each planted bug is.

A sound release fails an audit with probability at most 10^-6 (the confidence used here), and the draws are seeded.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from hf_dp_xattn import DPXAttnConfig
from hf_dp_xattn.audit.audit_report import PASS, Check
from hf_dp_xattn.audit.empirical import audit_releases, preparer, targets
from hf_dp_xattn.audit.settings import SMALLER
from hf_dp_xattn.mechanisms.anchors import histogram, row_sum
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.mixed import AnchorMixed
from hf_dp_xattn.mechanisms.anchors.sources import AnchorHistogram, AnchorSum, PreparedAnchors
from hf_dp_xattn.mechanisms.base import Integers, LayerSpec, perturb
from hf_dp_xattn.mechanisms.dptree import tree_moments as dptree_moments
from hf_dp_xattn.mechanisms.dptree.budget import BudgetSplit
from hf_dp_xattn.mechanisms.dptree.dptree import PreparedDPTree
from hf_dp_xattn.mechanisms.kernel_sum import kernel_sum
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.additive import GeometricNoise, TruncatedLaplaceNoise
from hf_dp_xattn.privacy.bits import SeededEntropy
from hf_dp_xattn.privacy.response import RandomizedResponse

from ..mechanisms.anchors.naive_anchors import decoders, plan

ANCHORS = ("sum", "response", "histogram", "mixed")
SPECS = [LayerSpec("a", 2, 6, 6, 6**-0.5), LayerSpec("b", 1, 6, 4, 6**-0.5)]
CONFIDENCE = 1 - 1e-6


def prepare(kind: str, epsilon: float = 8.0, **changes: Any) -> tuple[Any, DPXAttnConfig]:
    mechanism = "anchors" if kind in ANCHORS else kind
    config = DPXAttnConfig(unit="row", mechanism=mechanism, epsilon=epsilon, projection_dim=3).replace(
        **changes
    )
    if kind in ANCHORS:
        return prepare_anchors(config, [plan(kind, stages=2)], decoders(kind)), config
    return prepare_release(config, SPECS), config


def run(
    prepared: Any,
    config: DPXAttnConfig,
    *,
    again: Callable[[DPXAttnConfig], Any] | None = None,
    smaller: tuple[float, ...] = SMALLER,
    draws: int = 20_000,
) -> dict[str, Check]:
    made = again or preparer(prepared, SPECS, None)
    found = targets(prepared, config, made, smaller)
    checks, bounds = audit_releases(found, draws=draws, confidence=CONFIDENCE, entropy=SeededEntropy(5))
    assert all(b.low <= b.ceiling for b in bounds)
    return {c.name: c for c in checks}


def verdicts(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.verdict for name, check in checks.items()}


SOUND = [
    *(
        (kind, unit, "replace_one")
        for kind in ("sum", "response", "histogram")
        for unit in ("row", "group", "context")
    ),
    ("mixed", "row", "replace_one"),
    *((kind, "row", "add_or_remove_one") for kind in ("sum", "histogram")),
    *(("kernel_sum", unit, "replace_one") for unit in ("row", "group", "context")),
    *(("kernel_sum", unit, "add_or_remove_one") for unit in ("row", "group")),
    *(("dptree", unit, "replace_one") for unit in ("row", "group", "context")),
    *(("dptree", unit, "add_or_remove_one") for unit in ("row", "group")),
]


@pytest.mark.parametrize(("kind", "unit", "neighboring"), SOUND, ids=lambda x: x)
@pytest.mark.slow
def test_at_the_right_noise_nothing_is_found(kind: str, unit: str, neighboring: str) -> None:
    prepared, config = prepare(kind, unit=unit, neighboring=neighboring)
    checks = run(prepared, config)
    assert set(verdicts(checks).values()) == {PASS}
    assert len(checks) == 3 + 3  # price, sensitivity, replay, and three epsilons


@pytest.mark.parametrize("kind", [*ANCHORS, "kernel_sum"])
def test_it_has_power(kind: str) -> None:
    """A third of the claim is seen at least at one epsilon; a bound near 0 everywhere would pass any release."""
    prepared, config = prepare(kind)
    found = targets(prepared, config, preparer(prepared, SPECS, None), SMALLER)
    _, bounds = audit_releases(found, draws=20_000, confidence=CONFIDENCE, entropy=SeededEntropy(5))
    assert max(b.low / b.claimed for b in bounds) > 0.4
    assert all(0.99 < b.gap <= 1.0 for b in bounds)


def half_the_noise(prepared: Any) -> Any:
    """Noise of half the scale (an answer at twice the epsilon), while the events say what they said."""
    if not isinstance(prepared, PreparedAnchors):
        return _half_sum(prepared)
    if isinstance(prepared, AnchorSum):
        return dataclasses.replace(prepared, prepared=_half_sum(prepared.prepared))
    if isinstance(prepared, AnchorMixed):
        counts = half_the_noise(prepared.histogram)
        return dataclasses.replace(prepared, sum=_half_sum(prepared.sum), histogram=counts)
    if isinstance(prepared, AnchorHistogram):
        own: Any = prepared.prepared.noise
        noise = GeometricNoise(2 * own.rate_plus, 2 * own.rate_minus)
        return dataclasses.replace(prepared, prepared=dataclasses.replace(prepared.prepared, noise=noise))
    honest: Any = prepared.response  # type: ignore[attr-defined]
    planted = copy.copy(
        RandomizedResponse.of(2 * honest.epsilon, honest.alphabet)
    )  # past the check of its odds
    object.__setattr__(planted, "epsilon", honest.epsilon)
    return dataclasses.replace(prepared, response=planted)  # type: ignore[call-arg]


def _half_sum(prepared: Any) -> Any:
    return dataclasses.replace(prepared, sigma_squared=Fraction(prepared.sigma_squared) / 4)


@pytest.mark.parametrize("kind", [*ANCHORS, "kernel_sum"])
def test_half_the_noise_is_caught(kind: str) -> None:
    prepared, config = prepare(kind)
    sound = preparer(prepared, SPECS, None)
    checks = run(half_the_noise(prepared), config, again=lambda c: half_the_noise(sound(c)))
    failed = [name for name, check in checks.items() if check.failed]
    assert any(name.startswith("empirical") for name in failed)


@pytest.mark.parametrize("kind", ["sum", "kernel_sum"])
def test_half_the_noise_is_caught_at_each_epsilon(kind: str) -> None:
    """Gaussian noise: whatever the claim, not only at small ones."""
    for epsilon in (16.0, 8.0, 2.0):
        prepared, config = prepare(kind, epsilon)
        checks = run(half_the_noise(prepared), config, smaller=())
        assert checks[f"empirical epsilon at {epsilon:.4g}"].failed


def twice(function: Callable[..., Any]) -> Callable[..., Any]:
    def doubled(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return [2 * t for t in found] if isinstance(found, list) else 2 * found

    return doubled


@pytest.mark.parametrize("kind", ["sum", "histogram", "mixed", "kernel_sum"])
def test_twice_the_sensitivity_is_caught(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contributions twice as long as the bound."""
    monkeypatch.setattr(row_sum, "clipped_rows", twice(row_sum.clipped_rows))
    exact = histogram.PreparedHistogram.exact_sums
    monkeypatch.setattr(histogram.PreparedHistogram, "exact_sums", twice(exact))
    monkeypatch.setattr(kernel_sum, "sum_rows", twice(kernel_sum.sum_rows))
    checks = run(*prepare(kind))
    assert checks["sensitivity"].failed
    assert any(check.failed for name, check in checks.items() if name.startswith("empirical"))


Planted = Callable[[Any, Integers, Any], Integers]


def plant(monkeypatch: pytest.MonkeyPatch, cls: Any, planted: Planted) -> None:
    """Another noise in releases of this mechanism; `parts` and events say what they said."""
    monkeypatch.setattr(cls, "noise", planted)


def test_a_release_that_answers_twice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws more than the law reads."""

    def planted(self: Any, exact: Integers, entropy: Any) -> Integers:
        perturb(exact, self.parts, entropy)
        return perturb(exact, self.parts, entropy)

    plant(monkeypatch, PreparedAnchors, planted)
    assert run(*prepare("response"), smaller=())["replay"].failed


@pytest.mark.parametrize("kind", ["sum", "mixed", "kernel_sum"])
@pytest.mark.parametrize("bug", ["half the noise", "no noise", "the noise twice"])
def test_another_noise_in_the_release_itself_is_caught(
    bug: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parameters are right, the release does not use them: the replay sees it, whatever the number of draws."""

    def planted(self: Any, exact: Integers, entropy: Any) -> Integers:
        if bug == "half the noise":
            return perturb(exact, half_the_noise(self).parts, entropy)
        noised = perturb(exact, self.parts, entropy)
        factor = 0 if bug == "no noise" else 2
        return tuple(t + factor * (y - t) for t, y in zip(exact, noised, strict=True))

    plant(monkeypatch, kernel_sum.PreparedKernelSum if kind == "kernel_sum" else PreparedAnchors, planted)
    assert run(*prepare(kind), smaller=())["replay"].failed


def test_counts_without_noise_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, PreparedAnchors, lambda self, exact, entropy: exact)
    assert run(*prepare("histogram"), smaller=())["replay"].failed


def test_a_price_that_is_too_low_is_caught() -> None:
    prepared, config = prepare("sum", 8.0)
    checks = run(prepared, config.replace(epsilon=4.0), smaller=())
    assert checks["price"].failed


# ---- dptree: the noise is Laplace's, and what a unit changes is spread over the levels of the trees

DRAWS = 4_000_000  # of few numbers; with fewer, half the noise does not show more than is claimed


def one_tree_each() -> tuple[Any, DPXAttnConfig]:
    """Few nodes: one head, one channel and the normaliser, one coordinate, two leaves."""
    config = DPXAttnConfig(unit="row", mechanism="dptree", epsilon=4.0, degree=1, tree_bins=2)
    return prepare_release(config, [LayerSpec("a", 1, 1, 1, 1.0)]), config


def laplace_of(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of a part of the scale, in the release and in its law; the event says what it said."""

    def noise(self: BudgetSplit) -> TruncatedLaplaceNoise:
        return TruncatedLaplaceNoise(Fraction(self.event.scale) / share, self.event.bound)

    monkeypatch.setattr(BudgetSplit, "noise", property(noise))


@pytest.mark.slow
def test_trees_have_power() -> None:
    prepared, config = one_tree_each()
    found = targets(prepared, config, preparer(prepared, SPECS, None), ())
    _, bounds = audit_releases(found, draws=DRAWS, confidence=CONFIDENCE, entropy=SeededEntropy(5))
    assert bounds[0].low / bounds[0].claimed > 0.4
    assert 0.7 < bounds[0].gap <= 1.0


@pytest.mark.slow
def test_half_the_noise_on_trees_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    laplace_of(2, monkeypatch)
    checks = run(*one_tree_each(), smaller=(), draws=DRAWS)
    assert {n for n, c in checks.items() if c.failed} == {"empirical epsilon at 4"}


def test_twice_the_sensitivity_of_trees_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dptree_moments, "clip_weights", twice(dptree_moments.clip_weights))
    checks = run(*one_tree_each(), smaller=(), draws=DRAWS)
    assert {n for n, c in checks.items() if c.failed} == {"sensitivity", "empirical epsilon at 4"}


@pytest.mark.parametrize("share", [0, 2], ids=["no noise", "half the noise"])
def test_another_noise_on_trees_themselves_is_caught(share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(self: Any, exact: Integers, entropy: Any) -> Integers:
        noise = self.split.noise
        smaller = dataclasses.replace(noise, scale=Fraction(noise.scale) / max(1, share))
        noised = tuple(smaller.perturb(t, entropy) for t in exact)
        return noised if share else exact

    plant(monkeypatch, PreparedDPTree, planted)
    assert run(*one_tree_each(), smaller=())["replay"].failed
