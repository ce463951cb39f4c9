"""Empirical epsilon: a lower bound from many releases of two neighbours, and three exact checks of what the bound rests on.

* **sensitivity**: no pair of neighbours that was tried contributes further apart than the charge assumes (exact integers);
* **price**: the events that are charged cost no more than the config says;
* **replay**: real releases are what the audited law makes of the same random bytes (`replay.py`);
* **empirical epsilon** (`statistics.py`): the likelihood ratio of N releases of each neighbour, a threshold chosen on one half of them and
  judged on the other. At a large epsilon N draws cannot show a broken release (an event of probability e^-epsilon is hardly seen), so
  the same code is audited at smaller epsilons too, with the public parts of the plan as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from ..mechanisms.base import Mechanism
from ..mechanisms.registry import prepare_release
from ..privacy.accountant import epsilon_of
from ..privacy.bits import Entropy, SystemEntropy
from .audit_report import FAIL, NOT_APPLICABLE, PASS, Check, EpsilonBound
from .laws import Law, claimed, is_gaussian, law_of
from .neighbours import Neighbours, worst_neighbours
from .replay import replayed
from .statistics import ceiling, epsilon_bound

REPLAYS = 2  # of each neighbour
USUAL_ERROR = 0.05
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Target:
    """A prepared release at one epsilon."""

    config: DPXAttnConfig
    law: Law


def targets(
    prepared: Mechanism[Any],
    config: DPXAttnConfig,
    prepare: Callable[[DPXAttnConfig], Any],
    smaller: Sequence[float],
) -> list[Target]:
    """The installed release, and the same one at smaller epsilons (`prepare` prepares it)."""
    audited = [Target(config, law_of(prepared))]
    for epsilon in smaller:
        if epsilon < config.epsilon:
            other = config.replace(epsilon=epsilon)
            audited.append(Target(other, law_of(prepare(other))))
    return audited


def preparer(
    prepared: Mechanism[Any], specs: Sequence[Any], calibration: Any
) -> Callable[[DPXAttnConfig], Any]:
    """How a release is prepared at another epsilon: of layers anew, others with the same plan, so that it is the same kind of release."""
    if KNOWN[prepared.config.mechanism].releases != "layers":
        return prepared.at
    return lambda config: prepare_release(config, specs, calibration)


def audit_releases(
    audited: Sequence[Target],
    *,
    draws: int,
    confidence: float,
    entropy: Entropy | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[list[Check], list[EpsilonBound]]:
    """The exact checks, and one bound for each target. step is told what is done next."""
    source = SystemEntropy() if entropy is None else entropy
    checks: list[Check] = [_price(audited)]
    try:
        step("neighbours")
        pairs = [worst_neighbours(t.law, t.config) for t in audited]
    except ConfigError as error:
        return [*checks, Check("empirical epsilon", NOT_APPLICABLE, str(error))], []
    checks.append(_sensitivity(pairs))
    step("replay")
    checks.append(_replay(audited, pairs))
    share = (1 - confidence) / len(audited)
    bounds = []
    for target, pair in zip(audited, pairs, strict=True):
        step(f"epsilon {target.config.epsilon:g}")
        bounds.append(_bound(target, pair, draws, share, confidence, source))
    checks += [_verdict(bound) for bound in bounds]
    return checks, bounds


def _price(audited: Sequence[Target]) -> Check:
    over = []
    for t in audited:
        cost = epsilon_of(t.law.events, t.config.delta)
        if cost > t.config.epsilon * (1 + _ROUNDING):
            over.append(f"epsilon {t.config.epsilon:g} is charged {cost:.6g}")
    text = (
        "; ".join(over)
        or "the events of a release, composed by the accountant, cost no more than the config's epsilon"
    )
    return Check("price", FAIL if over else PASS, text)


def _sensitivity(pairs: Sequence[Neighbours]) -> Check:
    worst = max(p.gap for p in pairs)
    tried = sum(p.tried for p in pairs)
    text = f"{tried} pairs of neighbours, made to be far apart: the furthest reach {worst:.4f} of what the charge assumes for one unit"
    return Check("sensitivity", PASS if worst <= 1 + _ROUNDING else FAIL, text)


def _replay(audited: Sequence[Target], pairs: Sequence[Neighbours]) -> Check:
    results = [
        replayed(t.law, context)
        for t, p in zip(audited, pairs, strict=True)
        for context in (p.one, p.other)
        for _ in range(REPLAYS)
    ]
    text = f"{sum(results)} of {len(results)} real releases of canaries are, bit for bit, what the audited law makes of the same bytes"
    return Check("replay", PASS if all(results) else FAIL, text)


def _bound(
    target: Target, pair: Neighbours, draws: int, error: float, confidence: float, entropy: Entropy
) -> EpsilonBound:
    ratios = []
    for which in (0, 1):
        scores = pair.views.scores(which, draws, entropy)
        ratios.append(scores[:, 0] - scores[:, 1])
    events = target.law.events
    epsilon, delta = claimed(events, target.config.delta)
    gaussian = is_gaussian(events)
    low, usual = (
        epsilon_bound(ratios[0], ratios[1], delta, e, gaussian=gaussian) for e in (error, USUAL_ERROR)
    )
    return EpsilonBound(
        claimed=epsilon,
        delta=delta,
        low=low,
        low_95=usual,
        ceiling=ceiling(draws, delta, error, gaussian=gaussian),
        draws=draws,
        confidence=confidence,
        family="gaussian" if gaussian else "any",
        gap=pair.gap,
    )


def _verdict(bound: EpsilonBound) -> Check:
    return Check(
        f"empirical epsilon at {bound.claimed:.4g}",
        PASS if bound.low <= bound.claimed else FAIL,
        f"releases of two neighbours show at least {bound.low:.3g} ({bound.low_95:.3g} at 95 %); {bound.claimed:.4g} is claimed",
    )
