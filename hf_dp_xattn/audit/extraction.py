"""The best possible extraction of a canary: an attacker who knows everything but which of k candidate texts is the private one.

The attacker knows the model, the calibration, the config and the candidates, sees the release itself (of which every picture, reply and
logit is post-processing) and computes each candidate's likelihood exactly. Under the uniform prior no attacker is right more often,
whatever it reads: naming the likeliest candidate is Bayes' rule. (Of noise that is not Gaussian, at most `laws.MOST` coordinates are read:
where candidates differ in more of a tree's nodes, the rate is a lower bound.) Model-specific
suites, which know no candidates, are in `examples/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..hosts.driver import Canary, Driver
from ..privacy.bits import Entropy, SystemEntropy
from ..privacy.guessing import guess_bound
from .audit_report import FAIL, PASS, Check, Extraction
from .laws import Context, Law, law_of
from .leaks import captured
from .statistics import lower_bound, upper_bound

_ERROR = 0.025  # on each side of the interval


def contexts_of(subject: Driver, canaries: Sequence[Canary]) -> list[Context]:
    """What the mechanism is given of each canary, on a protected host; each is released once, to find out."""
    handle = subject.handle
    recipe = handle.guard.prepare(handle.guard.current())
    with captured(handle) as kept:
        for canary in canaries:
            subject.release(canary)
    if len(kept) != len(canaries):
        raise ConfigError("Some of the candidates are the same context to this host; give different ones.")
    return [Context(recipe.private(rows, groups), groups) for rows, groups in kept]


@torch.no_grad()
def extract(
    subject: Driver, canaries: Sequence[Canary], *, trials: int, entropy: Entropy | None = None
) -> Extraction:
    """Plays the game `trials` times: a random candidate is released, and the likeliest one is guessed (ties at random).

    Raises:
        ConfigError: fewer than two candidates, or candidates that are the same to the host.
    """
    if len(canaries) < 2:
        raise ConfigError("An extraction needs at least two candidates.")
    with subject.protected() as handle:
        law = law_of(handle.guard.prepare(handle.guard.current()).prepared)
        contexts = contexts_of(subject, canaries)
    return play(
        law, contexts, subject.config, units=_units(subject, contexts), trials=trials, entropy=entropy
    )


def play(
    law: Law,
    contexts: Sequence[Context],
    config: DPXAttnConfig,
    *,
    units: int,
    trials: int,
    entropy: Entropy | None = None,
) -> Extraction:
    """The game on contexts as the mechanism is given them. units: in how many they differ."""
    source = SystemEntropy() if entropy is None else entropy
    views, k = law.views(contexts), len(contexts)
    generator = np.random.default_rng()
    drawn = np.bincount(generator.integers(0, k, trials), minlength=k)
    right = 0
    for which, count in enumerate(drawn.tolist()):
        if count:
            scores = views.scores(which, count, source)
            best = scores >= scores.max(1, keepdims=True) - 1e-9 * (1 + np.abs(scores.max(1, keepdims=True)))
            guess = (best * generator.random(best.shape)).argmax(1)
            right += int((guess == which).sum())
    return Extraction(
        candidates=k,
        units=units,
        trials=trials,
        rate=right / trials,
        low=float(lower_bound(right, trials, _ERROR)),
        high=float(upper_bound(right, trials, _ERROR)),
        bound=_bound(config, units, k),
        chance=1 / k,
    )


def _units(subject: Driver, contexts: Sequence[Context]) -> int:
    """In how many units two candidates differ at most."""
    if subject.config.unit == "context" or subject.by_groups:
        return 1
    return max(1, *(_different_rows(a, b) for i, a in enumerate(contexts) for b in contexts[:i]))


def _different_rows(a: Context, b: Context) -> int:
    one, other = (
        [c.rows] if isinstance(c.rows, torch.Tensor) else [*c.rows.keys, *c.rows.values] for c in (a, b)
    )
    sizes = one[0].shape[-2], other[0].shape[-2]
    n = min(sizes)
    differs = torch.zeros(n, dtype=torch.bool)
    for x, y in zip(one, other, strict=True):
        differs |= (x[..., :n, :] != y[..., :n, :]).cpu().any(-1).reshape(-1, n).any(0)
    return max(sizes) - n + int(differs.sum())


def _bound(config: DPXAttnConfig, units: int, candidates: int) -> float:
    """`guess_bound` at prior 1 / k, by group privacy where candidates differ in several units: (m epsilon, delta sum_j e^(j epsilon))."""
    steps = [j * config.epsilon for j in range(units)]
    largest = steps[-1]
    delta = config.delta * math.exp(largest) * units if largest < 30 else 1.0
    if delta >= 1:
        return 1.0
    return guess_bound(units * config.epsilon, delta, 1 / candidates, config.neighboring)


def verdict(game: Extraction) -> Check:
    """Fails where even the lower end of the interval at a very small error lies above what the guarantee allows."""
    right = round(game.rate * game.trials)
    low = float(lower_bound(right, game.trials, 1e-6))
    text = (
        f"the best guess among {game.candidates} candidates that differ in {game.units} unit(s) is right in {100 * game.rate:.1f} % of "
        f"{game.trials:,} releases; at most {100 * game.bound:.1f} % is allowed, {100 * game.chance:.1f} % is chance"
    )
    return Check("extraction", FAIL if low > game.bound else PASS, text)
