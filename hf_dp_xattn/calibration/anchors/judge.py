"""A plan's quality, predicted: real releases of public contexts that it was not fitted to, beside no release at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.fallback import FALLBACKS, Fallback, Worth, drawn
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.context_rows import ContextRows
from .held_out import HeldOut
from .intervals import ratio_interval, t_quantile
from .objective import Objective, fvu
from .simulated import simulate
from .slots_fit import PublicContexts

_FEWEST_KINDS = 4
_ALIKE = 0.5  # correlation of contexts of one kind, where it cannot be told


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
    def weight(self) -> float:
        return 1.0 if self.plan.worth is None else self.plan.worth.weight

    @property
    def divergence(self) -> float | None:
        divergence = self.measured.divergence
        return None if divergence is None else float(divergence.mean())


class Jury:
    """Judges plans on held-out public contexts. The exact outputs, and what the fall-back gives, are computed once."""

    def __init__(
        self,
        config: DPXAttnConfig,
        held: HeldOut,
        objective: Objective,
        fallback: Fallback,
    ) -> None:
        self.config, self.held, self.objective, self.fallback = config, held, objective, fallback
        contexts = held.validation
        self._exact = objective.exact(contexts.whole, outputs=contexts.outputs, usual=~held.unlike)
        self.variances = self._exact.variances.sum(2)
        context = ContextRows(fallback.rows, fallback.log_weights)
        # "none" leaves the exact public rows alone, where there are some
        kinds = FALLBACKS if len(objective.public_rows) else FALLBACKS[:1]
        nothing = {
            against: self.measured(
                [drawn(context, Worth(against, 0.0, "", 1.0, 1.0), fallback)] * len(contexts)
            )
            for against in kinds
        }
        self.measure = "fvu" if contexts.replies is None else "divergence"
        # of contexts like the public ones
        self.levels = {
            k: float(self.scores(measured)[~held.unlike].mean()) for k, measured in nothing.items()
        }
        self.against = min(self.levels, key=lambda k: self.levels[k])
        self.nothing = nothing[self.against]

    def measured(self, decoded: Sequence[ContextRows]) -> Measured:
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
        measured = self.measured(rows)
        return Judged(dataclasses.replace(plain, quality=self.quality(measured.errors, plan)), measured, rows)

    def quality(self, errors: torch.Tensor, plan: AnchorPlan) -> Quality:
        """FVU of contexts like the public ones; the interval is of what as many fresh contexts give, of kinds like the public ones or of
        kinds that nothing was fitted to.

        Args:
            errors: [N, L].
            plan: whose they are.
        """
        factor = 1.0 - 1.0 / max(
            2, int((~self.held.unlike).sum())
        )  # the variance is about these contexts' own mean
        intervals = []
        for part in (~self.held.unlike, self.held.unlike):
            if bool(part.any()):
                units, widened = counted(self.held.kinds[part])
                intervals.append(
                    ratio_interval(errors[part], self.variances[part], units, fresh=True, widened=widened)
                )
        value = factor * intervals[0][0]
        low, high = (factor * limit for limit in (min(f[1] for f in intervals), max(f[2] for f in intervals)))
        lies = self._of_lies(plan)
        low, high = value - math.hypot(value - low, lies), value + math.hypot(high - value, lies)
        return Quality(value, max(0.0, low), min(high, 1e9), len(errors))

    def _of_lies(self, plan: AnchorPlan) -> float:
        """How far untrue answers of randomised response move the FVU of as many fresh contexts, at most (95 %). They may be so rare that
        the held-out contexts hold none; how rare is known. Each is as far off as another context is: twice the variance."""
        if plan.release != "response":
            return 0.0
        contexts = self.held.validation
        untrue = 1.0 - plan.noise ** len(plan.codes)
        units = float(contexts.mask.sum(1).double().mean())
        error = 2.0 * math.sqrt(2.0 * untrue * (1.0 - untrue) / (len(contexts) * units))
        return t_quantile(0.975, 1000) * error

    def ratio(self, measured: Measured, among: torch.Tensor) -> float:
        """What decides between plans: the measure over the fall-back's, among these contexts [N] bool; the mean of known and unseen
        kinds, or that of the unseen ones alone where they are worse off than with the fall-back."""
        scores, none = self.scores(measured), self.scores(self.nothing)
        ratios = [
            float(scores[part].sum() / none[part].sum().clamp_min(1e-30))
            for part in (among & ~self.held.unlike, among & self.held.unlike)
            if bool(part.any())
        ]
        return ratios[-1] if ratios[-1] > 1.0 else sum(ratios) / len(ratios)

    def replaced(self, measured: Measured, lost: torch.Tensor) -> Measured:
        """With the fall-back in place of these shares `lost` [N] of each context's releases."""
        none, divergence = self.nothing, measured.divergence
        lost = lost.to(measured.errors)
        return Measured(
            torch.lerp(measured.errors, none.errors, lost.unsqueeze(1)),
            None
            if divergence is None or none.divergence is None
            else torch.lerp(divergence, none.divergence, lost.to(divergence)),
        )


def counted(kinds: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What an interval counts, and by how much it is wider than that says: kinds [N]; where there are too few to tell how much these vary,
    contexts, which within a kind are alike (the design effect of clusters, with a usual correlation)."""
    count = len(torch.unique(kinds))
    if count >= _FEWEST_KINDS:
        return kinds, 1.0
    return torch.arange(len(kinds)), (1.0 + _ALIKE * max(0.0, len(kinds) / count - 1.0)) ** 0.5


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
