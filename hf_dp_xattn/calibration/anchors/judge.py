"""A plan's quality, predicted: releases of public contexts that it was not fitted to, through the mechanism itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...config import DPXAttnConfig
from ...mechanisms.anchors.anchors import prepare_anchors
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.context_rows import ContextRows
from ...privacy.bits import SeededEntropy
from .objective import Objective, fvu, fvu_interval
from .slots_fit import PublicContexts


@dataclass(frozen=True)
class Judged:
    """A plan with its quality, and the divergence of its replies where the host's replies count."""

    plan: AnchorPlan
    divergence: float | None

    @property
    def score(self) -> float:
        """What decides between plans of one epsilon; less is better."""
        return self.plan.quality.fvu if self.divergence is None else self.divergence


def judge(
    plan: AnchorPlan,
    config: DPXAttnConfig,
    decoders: Decoders,
    validation: PublicContexts,
    objective: Objective,
) -> Judged:
    """The plan with its predicted quality: real releases (seeded noise) of held-out public contexts."""
    decoded = simulate(plan, config, decoders, validation)
    pairs = [(c.rows, c.log_weights) for c in decoded]
    errors, variances = objective.measure(validation.whole.float(), pairs, outputs=validation.outputs)
    low, high = fvu_interval(errors, variances)
    diverged = None
    if validation.replies is not None:
        diverged = float(objective.divergences(validation.replies, pairs).mean())
    quality = Quality(fvu(errors, variances), low, high, len(validation))
    return Judged(dataclasses.replace(plan, quality=quality), diverged)


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
