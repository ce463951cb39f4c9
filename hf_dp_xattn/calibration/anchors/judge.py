"""A plan's quality, predicted: real releases of public contexts that it was not fitted to, beside no release at all.

*Choice.* For each epsilon the plans, and the best one's rows drawn towards the fall-back by several weights, are compared by their measure
(FVU, or the divergence of replies) over that of the fall-back: the mean of this ratio over contexts of known and of unseen kinds. What
makes contexts of unseen kinds worse than the fall-back is not chosen.

*What it is worth.* Choosing among many flatters the chosen one. So the choice is made anew on one half of the kinds and judged on the
other, and the reverse: the ratio and its bound are those of the contexts that took no part in the choice. A plan that is not better than
the fall-back with 95 % confidence becomes the fall-back (weight 0), which does no harm on any context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.anchors import prepare_anchors
from ...mechanisms.anchors.fallback import FALLBACKS, Fallback, Worth, drawn
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.context_rows import ContextRows
from ...privacy.bits import SeededEntropy
from .held_out import HeldOut
from .intervals import ratio_interval
from .objective import Objective, fvu
from .slots_fit import PublicContexts

WEIGHTS = (0.7, 0.4, 0.2, 0.1)
_FEWEST_KINDS = 4


@dataclass(frozen=True, eq=False)
class Measured:
    """Of each context: errors [N, L], summed over heads, and divergence [N] where the host's replies count."""

    errors: torch.Tensor
    divergence: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class Judged:
    """A plan as it is decoded (`plan.worth` says how), and what it gave."""

    plan: AnchorPlan
    measured: Measured
    rows: list[ContextRows]

    @property
    def divergence(self) -> float | None:
        found = self.measured.divergence
        return None if found is None else float(found.mean())


class Jury:
    """Judges plans on held-out public contexts. The exact outputs, and what the fall-back gives, are computed once."""

    def __init__(
        self, config: DPXAttnConfig, held: HeldOut, objective: Objective, fallback: Fallback
    ) -> None:
        self.config, self.held, self.objective, self.fallback = config, held, objective, fallback
        contexts = held.validation
        self._exact = objective.exact(contexts.whole, outputs=contexts.outputs, usual=~held.unlike)
        self.variances = self._exact.variances.sum(2)
        context = ContextRows(fallback.rows, fallback.log_weights)
        # "none" leaves the exact public rows alone, where there are some
        kinds = FALLBACKS if len(objective.public_rows) else FALLBACKS[:1]
        nothing = {
            against: self._measure(
                [drawn(context, Worth(against, 0.0, "", 1.0, 1.0), fallback)] * len(contexts)
            )
            for against in kinds
        }
        self.measure = "fvu" if contexts.replies is None else "divergence"
        # of contexts like the public ones
        self.levels = {k: float(self.scores(found)[~held.unlike].mean()) for k, found in nothing.items()}
        self.against = min(self.levels, key=lambda k: self.levels[k])
        self.nothing = nothing[self.against]

    def _measure(self, decoded: Sequence[ContextRows]) -> Measured:
        pairs = [(c.rows, c.log_weights) for c in decoded]
        errors = self.objective.errors(self._exact, pairs).sum(2)
        replies = self.held.validation.replies
        return Measured(
            errors, None if replies is None else self.objective.divergences(replies, pairs).double()
        )

    def scores(self, measured: Measured) -> torch.Tensor:
        """[N]: each context's share of what decides; the mean is the FVU, or the divergence."""
        if measured.divergence is not None:
            return measured.divergence
        return len(self.variances) * (measured.errors / self.variances.sum(0).clamp_min(1e-30)).mean(1)

    def judge(self, plan: AnchorPlan, decoders: Decoders) -> Judged:
        """The plan as it is, with its quality.

        Args:
            plan: of any release.
            decoders: that serve it.
        """
        plain = dataclasses.replace(plan, worth=None)
        rows = simulate(plain, self.config, decoders, self.held.validation)
        measured = self._measure(rows)
        return Judged(dataclasses.replace(plain, quality=self.quality(measured.errors)), measured, rows)

    def quality(self, errors: torch.Tensor) -> Quality:
        """FVU of contexts like the public ones; the interval also covers that of contexts of kinds that nothing was fitted to.

        Args:
            errors: [N, L].
        """
        factor = 1.0 - 1.0 / max(
            2, int((~self.held.unlike).sum())
        )  # the variance is about these contexts' own mean
        found = [
            ratio_interval(errors[part], self.variances[part], counted(self.held.kinds[part]))
            for part in (~self.held.unlike, self.held.unlike)
            if bool(part.any())
        ]
        low, high = (factor * limit for limit in (min(f[1] for f in found), max(f[2] for f in found)))
        return Quality(factor * found[0][0], low, min(high, 1e9), len(errors))

    def ratio(self, measured: Measured, among: torch.Tensor) -> float:
        """What decides between plans: the measure over the fall-back's, among these contexts [N] bool; the mean of known and unseen
        kinds, or that of the unseen ones alone where they are worse off than with the fall-back."""
        own, none = self.scores(measured), self.scores(self.nothing)
        ratios = [
            float(own[part].sum() / none[part].sum().clamp_min(1e-30))
            for part in (among & ~self.held.unlike, among & self.held.unlike)
            if bool(part.any())
        ]
        return ratios[-1] if ratios[-1] > 1.0 else sum(ratios) / len(ratios)

    def choose(self, judged: Sequence[Judged]) -> AnchorPlan:
        """The best plan of one epsilon, drawn towards the fall-back as far as is good, and what it is worth.

        Args:
            judged: the plans of that epsilon.
        """
        everyone = torch.ones(len(self.variances), dtype=torch.bool)
        best = min(judged, key=lambda j: self.ratio(j.measured, everyone))
        tried = [*judged, *(self._drawn(best, w) for w in WEIGHTS), self._drawn(best, 0.0)]
        chosen = min(tried, key=lambda j: self.ratio(j.measured, everyone))
        half = self.held.kinds % 2 == 0
        apart = torch.zeros_like(self.scores(best.measured))
        for part in (half, ~half):
            if bool(part.any()) and bool((~part).any()):
                own = min(tried, key=lambda j: self.ratio(j.measured, ~part))
                apart[part] = self.scores(own.measured)[part]
            else:
                apart[part] = self.scores(chosen.measured)[part]
        # one side of 95 %: the upper end of 90 %
        none = self.scores(self.nothing).unsqueeze(1)
        ratio, _, high = ratio_interval(apart.unsqueeze(1), none, self.held.kinds, 0.9)
        if high >= 1.0:
            chosen = tried[-1]
        weight = 1.0 if chosen.plan.worth is None else chosen.plan.worth.weight
        worth = Worth(self.against, weight, self.measure, ratio, min(high, 1e9))
        return dataclasses.replace(chosen.plan, worth=worth)

    def _drawn(self, judged: Judged, weight: float) -> Judged:
        worth = Worth(self.against, weight, self.measure, 1.0, 1.0)
        rows = [drawn(r, worth, self.fallback) for r in judged.rows]
        measured = self.nothing if weight == 0.0 else self._measure(rows)
        plan = dataclasses.replace(judged.plan, worth=worth, quality=self.quality(measured.errors))
        return Judged(plan, measured, rows)


def counted(kinds: torch.Tensor) -> torch.Tensor:
    """What an interval counts: kinds [N]; contexts where there are too few kinds to tell how much these vary."""
    return kinds if len(torch.unique(kinds)) >= _FEWEST_KINDS else torch.arange(len(kinds))


def judge(
    plan: AnchorPlan,
    config: DPXAttnConfig,
    decoders: Decoders,
    contexts: PublicContexts,
    objective: Objective,
) -> float:
    """FVU of real releases (seeded noise) of these public contexts."""
    decoded = simulate(plan, config, decoders, contexts)
    exact = objective.exact(contexts.whole, outputs=contexts.outputs)
    errors = objective.errors(exact, [(c.rows, c.log_weights) for c in decoded])
    return fvu(errors, exact.variances)


def simulate(
    plan: AnchorPlan, config: DPXAttnConfig, decoders: Decoders, contexts: PublicContexts, *, seed: int = 1
) -> list[ContextRows]:
    """Decoded rows of PUBLIC contexts through the mechanism itself, with seeded noise. A pooled unit is one row to it."""
    prepared = prepare_anchors(config.replace(epsilon=plan.epsilon, unit="row"), [plan], decoders)
    out = []
    for i in range(len(contexts)):
        rows = contexts.units[i][contexts.mask[i]].float()
        released = prepared.run(rows, entropy=SeededEntropy(seed * 1_000_003 + i))
        assert released.context is not None
        out.append(released.context)
    return out
