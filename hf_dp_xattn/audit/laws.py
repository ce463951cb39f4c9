"""The law of a prepared release, for canaries: exact contributions, noise drawn in bulk, log-likelihoods.

A release is too slow to be made ten thousand times, and most of it need not be: what a context contributes is fixed, only the noise is
new. So the contributions are computed once, by the release's own code, and the noise is drawn in bulk by the release's own
sampler at the release's own parameters. That a real release is just this, bit for bit, is shown for a few of them by `replay.py`.

Coordinates in which no candidate differs from another have the same law under all of them and are left out: they tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import ConfigError
from ..mechanisms.base import Mechanism, NoisePart, by_tensor
from ..privacy.accountant import Event, GaussianEvent, epsilon_of, needs_delta
from ..privacy.additive import AdditiveNoise, GaussianNoise
from ..privacy.bits import Entropy
from ..privacy.response import Response

SAMPLED = (
    512  # coordinates whose noise the release's own sampler draws: those in which candidates differ most
)
MOST = 2**14  # likewise, of noise that is not Gaussian
_CHUNK = 2**22


@dataclass(frozen=True, eq=False)
class Context:
    """A canary. rows: what the mechanism is given, `LayerRows` or [n, C]. groups [n]: public."""

    rows: Any
    groups: torch.Tensor | None = None


class Views(Protocol):
    """What k contexts contribute; private of real contexts, and here of canaries only."""

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        """[draws, k]: log-likelihood of releases of context `which` under each context, up to a number that all k share."""
        ...

    def gap(self, one: int, other: int) -> float:
        """How far apart two of them are, as a share of what one neighbouring step may change; above 1 nothing holds."""
        ...


@dataclass(frozen=True, eq=False)
class AdditiveViews:
    """totals [k, D]: exact integer sums. event: what is charged for them."""

    totals: torch.Tensor
    noise: AdditiveNoise
    event: Event

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        spread = self.totals.amax(0) - self.totals.amin(0)
        order = torch.argsort(spread, descending=True)[: int((spread > 0).sum())]
        gaussian = isinstance(self.noise, GaussianNoise)
        sampled = order[: SAMPLED if gaussian else MOST]
        totals = self.totals[:, sampled]
        k, width = totals.shape
        total = np.zeros((draws, k))
        step = max(1, _CHUNK // max(1, k * width))
        for start in range(0, draws if width else 0, step):
            size = min(step, draws - start)
            noise = self.noise.sample(size * width, entropy).view(size, width)
            for c in range(k):
                total[start : start + size, c] = self.noise.log_weight(
                    noise + (totals[which] - totals[c])
                ).sum(-1)
        if isinstance(self.noise, GaussianNoise) and len(order) > len(sampled):
            rest = (self.totals[which] - self.totals)[:, order[SAMPLED:]].double()
            total += _projected(rest, float(self.noise.sigma_squared), draws)
        return total

    def gap(self, one: int, other: int) -> float:
        return self.noise.gap(self.totals[one] - self.totals[other], self.event)


def _projected(differences: torch.Tensor, variance: float, draws: int) -> np.ndarray:
    """[draws, k] log-likelihoods of Gaussian noise z at z + d_c, up to what all k share: -(2 <z, d_c> + |d_c|^2) / (2 variance).

    What is random of it are the k products <z, d_c>, jointly Gaussian, so that no coordinate need be drawn. That lattice noise is
    Gaussian here is no part of any proof: its distance is exp(-2 pi^2 variance), and what a sampler gets wrong shows in those drawn.

    differences: [k, D], in lattice steps.
    """
    gram = differences @ differences.mT
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(0.0).sqrt()
    products = torch.from_numpy(np.random.default_rng().standard_normal((draws, len(gram)))) @ root.mT
    scores: np.ndarray = (-(products / variance**0.5) - gram.diagonal() / (2 * variance)).numpy()
    return scores


@dataclass(frozen=True, eq=False)
class AnswerViews:
    """integers [k, m, .]: of each context's m answers. stages: how many of them one unit has."""

    response: Response
    integers: torch.Tensor
    stages: int

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        cells = self.integers[which]
        answers = self.response.perturb(cells.repeat(draws, 1), entropy).view(draws, len(cells)).numpy()
        return np.stack([self.response.log_weights(other, answers) for other in self.integers], axis=1)

    def gap(self, one: int, other: int) -> float:
        return int((self.integers[one] != self.integers[other]).any(-1).sum()) / self.stages


@dataclass(frozen=True, eq=False)
class JointViews:
    """Independent parts of one release."""

    parts: tuple[Views, ...]

    def scores(self, which: int, draws: int, entropy: Entropy) -> np.ndarray:
        return np.asarray(sum(p.scores(which, draws, entropy) for p in self.parts))

    def gap(self, one: int, other: int) -> float:
        return max(p.gap(one, other) for p in self.parts)


@dataclass(frozen=True, eq=False)
class Law:
    """A release whose public part is fixed: its exact integers, and the noise of each of their parts."""

    prepared: Mechanism[Any]

    @property
    def events(self) -> tuple[Event, ...]:
        return self.prepared.events

    def views(self, contexts: Sequence[Context]) -> Views:
        parts = self.prepared.parts
        flat: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in parts]
        for context in contexts:
            exact = self.prepared.exact(context.rows, context.groups)
            for numbered, (part, tensors) in zip(flat, by_tensor(parts, exact), strict=True):
                stacked = isinstance(part.noise, Response)
                numbers = (
                    torch.stack(tensors, dim=-1).reshape(-1)
                    if stacked
                    else torch.cat([t.flatten() for t in tensors])
                ).cpu()
                # a canary fills few of a tree's nodes, which are too many to keep for every context
                at = torch.arange(len(numbers)) if stacked else numbers.nonzero().squeeze(1)
                numbered.append((at, numbers[at]))
        views = [_views(part, numbered) for part, numbered in zip(parts, flat, strict=True)]
        return views[0] if len(views) == 1 else JointViews(tuple(views))


def _views(part: NoisePart, filled: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Views:
    """filled: where each context's integers are not zero, and what they are."""
    if isinstance(part.noise, Response):
        if len({len(numbers) for _, numbers in filled}) > 1:
            raise ConfigError("Each unit is answered once: their number is public.")
        integers = torch.stack([numbers for _, numbers in filled]).view(len(filled), -1, part.noise.width)
        return AnswerViews(part.noise, integers, len(part.events) * part.noise.together)
    if not isinstance(part.noise, AdditiveNoise):
        raise ConfigError(f"{type(part.noise).__name__} has no law to audit.")
    every = torch.unique(torch.cat([at for at, _ in filled]))
    totals = torch.zeros(len(filled), len(every), dtype=torch.int64)
    for row, (at, values) in zip(totals, filled, strict=True):
        row[torch.searchsorted(every, at)] = values
    return AdditiveViews(totals, part.noise, part.events[0])


def law_of(prepared: Mechanism[Any]) -> Law:
    """The law of a prepared release. Raises ConfigError where it has none (exact attention)."""
    if not prepared.parts:
        raise ConfigError(f"{type(prepared).__name__} is not a noised release: it has no law to audit.")
    return Law(prepared)


def is_gaussian(events: Sequence[Event]) -> bool:
    """Whether all noise is Gaussian: then its trade-off curve is known up to one number."""
    return all(isinstance(e, GaussianEvent) for e in events)


def claimed(events: Sequence[Event], delta: float) -> tuple[float, float]:
    """(epsilon, delta) that the events are charged for; a pure release promises its epsilon at delta = 0."""
    at = delta if needs_delta(events) else 0.0
    return epsilon_of(events, at), at
