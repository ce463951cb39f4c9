"""The choice of each epsilon's plan, and what it is worth, on public contexts and on contexts unlike all of them.

*Choice.* For each epsilon the plans, and the best one's rows drawn towards the fall-back by several weights, are compared by their measure
(FVU, or the divergence of replies) over that of the fall-back: the mean of this ratio over contexts of known and of unseen kinds. What
makes contexts of unseen kinds worse than the fall-back is not chosen.

*What it is worth.* Choosing among many flatters the chosen one. So the choice is made anew on one half of the kinds and judged on the
other, and the reverse: the ratio and its bound are those of the contexts that took no part in the choice. A plan that is not better than
the fall-back with 95 % confidence becomes the fall-back (weight 0), which does no harm on any context.

*Contexts unlike all public ones* (`unlike_contexts.py`). Releases whose statistic (`Likeness`) lies outside of limits give the fall-back.
Which limits, and whether all rows are drawn further towards the fall-back, is what does least harm to unlike contexts among what keeps most
of the gain on public ones. Of limits that do equally well the middle ones are taken: public contexts that nobody has seen yet, and unlike
ones, come a little beyond those that were tried. What the limits cost is judged on the half of the kinds that they were not chosen by.
A context whose release looks like a public one's is not told from it, and what that came to is kept (`Worth.unlike`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ...mechanisms.anchors.fallback import Worth, drawn
from ...mechanisms.anchors.likeness import Likeness
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from ...mechanisms.context_rows import ContextRows
from .documents_fit import Documents
from .intervals import ratio_interval
from .judge import Judged, Jury, Measured
from .likeness_fit import likeness_of, limits_between, outside, with_limits
from .objective import Exact
from .simulated import released_features, simulate
from .slots_fit import PublicContexts
from .unlike_contexts import unlike_contexts

WEIGHTS = (0.85, 0.7, 0.55, 0.4, 0.3, 0.2, 0.1)
_FURTHER = (0.7, 0.4, 0.2, 0.1)  # where limits alone do harm: each is measured on all unlike contexts
_LOSS = 0.1  # of the ratio on public contexts, that doing no harm to unlike ones may cost; or that share of the gain, if it is more:
_LOST_GAIN = 0.35  # but never more than the ratio itself: what is good stays so
_ALIKE = 0.002  # ratios on public contexts that differ by no more are equal
_HARMLESS = 1.012
_SOURCES = 64  # public contexts whose rows unlike ones are made of
_CLEAR = 0.75  # ratio on public contexts
_LIKENESS_SEEDS = (11, 12)
_PUBLIC_SEEDS = (1, 2, 3, 4)  # releases of each held-out context by which limits are chosen


@dataclass(frozen=True, eq=False)
class Guarded:
    """A plan with limits of its likeness.

    measured: of its rows without limits. lost [N]: the share of releases of each held-out public context that give the fall-back.
    limits: below and above; None: no release does. unlike: the largest ratio of the error of unlike contexts to the fall-back's, over
    their kinds.
    """

    judged: Judged
    measured: Measured
    lost: torch.Tensor
    limits: tuple[float, float] | None
    unlike: float

    def same_but_for_low(self, other: Guarded) -> bool:
        """Whether nothing but the lower limit differs."""
        if self.limits is None or other.limits is None:
            return False
        # each has a plan of its own, but the rows are those of one
        return self.measured is other.measured and self.limits[1] == other.limits[1]


@dataclass(frozen=True, eq=False)
class _Kind:
    """Unlike contexts of one kind; nothing [N, L]: the errors of the fall-back."""

    contexts: PublicContexts
    exact: Exact
    nothing: torch.Tensor

    def ratio(self, errors: torch.Tensor, missed: torch.Tensor | None) -> float:
        """Of errors [N, L] to the fall-back's, the mean over layers: with 95 % confidence no more than this, as limits are chosen by few
        contexts; missed [N]: releases that give the fall-back."""
        if missed is not None:
            errors = torch.where(missed.unsqueeze(1), self.nothing, errors)
        return ratio_interval(errors, self.nothing, torch.arange(len(errors)), 0.9)[2]


@dataclass(frozen=True, eq=False)
class _Releases:
    """Of one plan: its likeness, the statistic [S, N] of held-out public releases, and rows and statistics [n] of each unlike kind's."""

    likeness: Likeness | None
    public: torch.Tensor
    rows: list[list[ContextRows]]
    unlike: list[torch.Tensor]


class Guard:
    """Chooses plans. Unlike contexts are made once.

    Args:
        jury: judges on public contexts.
        documents: public ones, where units are documents.
    """

    def __init__(self, jury: Jury, documents: Documents | None = None) -> None:
        self._jury = jury
        nothing = drawn(
            ContextRows(jury.fallback.rows, jury.fallback.log_weights),
            Worth(jury.against, 0.0, "", 1.0, 1.0),
            jury.fallback,
        )
        objective = jury.objective
        self._kinds: list[_Kind] = []
        # of rows that are like all public ones: half of those held out are of few kinds
        known = jury.held.training
        some = known.part(torch.arange(min(_SOURCES, len(known))))
        for _, contexts in unlike_contexts(some, objective.public_rows, documents, seed=0):
            exact = objective.exact(contexts.whole)
            errors = objective.errors(exact, [(nothing.rows, nothing.log_weights)] * len(contexts)).sum(2)
            self._kinds.append(
                _Kind(dataclasses.replace(contexts, whole=contexts.whole[:, :0]), exact, errors)
            )

    def choose(self, judged: Sequence[Judged], decoders: Decoders) -> AnchorPlan:
        """The best plan of one epsilon, drawn towards the fall-back as far as is good, and what it is worth.

        Args:
            judged: the plans of that epsilon.
            decoders: that serve them.
        """
        jury = self._jury
        everyone = torch.ones(len(jury.variances), dtype=torch.bool)
        best = min(judged, key=lambda j: jury.ratio(j.measured, everyone))
        drawn_by = cache(lambda weight: self._drawn(best, weight))
        nothing = drawn_by(0.0)
        tried = [*judged, nothing]
        # what is far better than nothing is not bettered by drawing
        if jury.ratio(best.measured, everyone) > _CLEAR:
            tried += [drawn_by(w) for w in WEIGHTS]
        chosen = min(tried, key=lambda j: jury.ratio(j.measured, everyone))
        gated = self._gated(best, chosen, decoders, drawn_by)
        guarded = self._least_harm(gated, chosen, everyone)
        errors = guarded.measured.errors.clone()
        apart = torch.zeros_like(jury.scores(best.measured))
        half = jury.held.kinds % 2 == 0
        for part in (half, ~half):
            if bool(part.any()) and bool((~part).any()):
                selected = min(tried, key=lambda j: jury.ratio(j.measured, ~part)).measured
                limited = self._least_harm(gated, chosen, ~part)
            else:
                selected, limited = chosen.measured, guarded
            errors[part] = jury.replaced(limited.measured, limited.lost).errors[part]
            if guarded.judged.weight < chosen.weight:  # unlike contexts chose that, not these
                selected = limited.measured
            apart[part] = jury.scores(jury.replaced(selected, limited.lost))[part]
        # one side of 95 %: the upper end of 90 %
        none = jury.scores(jury.nothing).unsqueeze(1)
        ratio, _, high = ratio_interval(apart.unsqueeze(1), none, jury.held.kinds, 0.9)
        plan = guarded.judged.plan
        plan = dataclasses.replace(plan, quality=jury.quality(errors, plan))
        unlike = guarded.unlike
        if high >= 1.0:
            plan, unlike = nothing.plan, 1.0
        weight = 1.0 if plan.worth is None else plan.worth.weight
        worth = Worth(jury.against, weight, jury.measure, ratio, min(high, 1e9), round(unlike, 4))
        return dataclasses.replace(plan, worth=worth)

    def _least_harm(self, gated: Sequence[Guarded], chosen: Judged, among: torch.Tensor) -> Guarded:
        """What does least harm to unlike contexts, and keeps most of the gain on these public ones.

        Args:
            gated: what there is, the plan as chosen and without limits first.
            chosen: that plan.
            among: [N] bool, of the held-out contexts.
        """
        ratios = [self._jury.ratio(self._jury.replaced(g.measured, g.lost), among) for g in gated]
        limit = _bearable(self._jury.ratio(chosen.measured, among))
        # what does no harm is as good as what does good: then public contexts decide
        harm, ratio, best = min(
            (
                (max(_HARMLESS, g.unlike), r, i)
                for i, (g, r) in enumerate(zip(gated, ratios, strict=True))
                if r <= limit
            )
        )
        equal = [
            g
            for g, r in zip(gated, ratios, strict=True)
            if r <= min(limit, ratio + _ALIKE)
            and max(_HARMLESS, g.unlike) <= harm
            and g.same_but_for_low(gated[best])
        ]
        return equal[len(equal) // 2] if equal else gated[best]

    def _drawn(self, judged: Judged, weight: float) -> Judged:
        worth = Worth(self._jury.against, weight, self._jury.measure, 1.0, 1.0)
        rows = [drawn(r, worth, self._jury.fallback) for r in judged.rows]
        measured = self._jury.nothing if weight == 0.0 else self._jury.measured(rows)
        plan = dataclasses.replace(
            judged.plan, worth=worth, quality=self._jury.quality(measured.errors, judged.plan)
        )
        return Judged(plan, measured, rows)

    def _gated(
        self, best: Judged, chosen: Judged, decoders: Decoders, drawn_by: Callable[[float], Judged]
    ) -> list[Guarded]:
        """The chosen plan with every pair of limits, and drawn further towards the fall-back where limits alone do harm.

        Args:
            best: the best plan as it is.
            chosen: that, drawn towards the fall-back or not.
            decoders: that serve them.
            drawn_by: the best plan, drawn towards the fall-back by a weight.
        """
        everyone = torch.ones(len(self._jury.variances), dtype=torch.bool)
        if chosen.weight == 0.0:
            return [Guarded(chosen, chosen.measured, torch.zeros(len(everyone)), None, 1.0)]
        releases = self._releases(dataclasses.replace(best.plan, worth=None), decoders)
        gated = self._limited(chosen, releases)
        for weight in (w for w in _FURTHER if w < chosen.weight):
            if self._least_harm(gated, chosen, everyone).unlike <= _HARMLESS:
                break
            gated += self._limited(drawn_by(weight), releases)
        return gated

    def _limited(self, judged: Judged, releases: _Releases) -> list[Guarded]:
        """The plan without limits, and with every pair of them."""
        jury, plan, likeness = self._jury, judged.plan, releases.likeness
        errors = []
        for kind, rows in zip(self._kinds, releases.rows, strict=True):
            pairs = [drawn(r, plan.worth, jury.fallback) for r in rows]
            errors.append(jury.objective.errors(kind.exact, [(c.rows, c.log_weights) for c in pairs]).sum(2))
        everything = Guarded(
            judged,
            judged.measured,
            torch.zeros(len(jury.variances)),
            None,
            max(kind.ratio(error, None) for kind, error in zip(self._kinds, errors, strict=True)),
        )
        if likeness is None:
            return [everything]
        gated = [everything]
        for low, high in limits_between(releases.public, releases.unlike):
            gate = with_limits(likeness, low, high)
            unlike = max(
                kind.ratio(error, outside(gate, statistic))
                for kind, error, statistic in zip(self._kinds, errors, releases.unlike, strict=True)
            )
            lost = outside(gate, releases.public).float().mean(0)
            limited = dataclasses.replace(judged, plan=dataclasses.replace(plan, likeness=gate))
            gated.append(Guarded(limited, judged.measured, lost, (low, high), unlike))
        return gated

    def _releases(self, plan: AnchorPlan, decoders: Decoders) -> _Releases:
        config = self._jury.config
        likeness = likeness_of(plan, config, decoders, self._jury.held.training, _LIKENESS_SEEDS)

        def statistic(contexts: PublicContexts, seed: int = 1) -> torch.Tensor:
            if likeness is None:
                return torch.ones(len(contexts))
            return likeness.statistic(released_features(plan, config, decoders, contexts, seed=seed))

        return _Releases(
            likeness,
            torch.stack([statistic(self._jury.held.validation, seed) for seed in _PUBLIC_SEEDS]),
            [simulate(plan, config, decoders, kind.contexts) for kind in self._kinds],
            [statistic(kind.contexts) for kind in self._kinds],
        )


def _bearable(ratio: float) -> float:
    """The ratio on public contexts that doing no harm to unlike ones may lead to."""
    return ratio + min(max(0.0, ratio), max(_LOSS, _LOST_GAIN * (1.0 - ratio)))
