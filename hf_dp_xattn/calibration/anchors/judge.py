"""A plan's quality, predicted: releases of public contexts that it was not fitted to, through the mechanism itself."""

from __future__ import annotations

import dataclasses

from ...config import DPXAttnConfig
from ...mechanisms.anchors.plan import AnchorPlan, Decoders, Quality
from ...mechanisms.anchors.release import prepare_anchors
from ...mechanisms.anchors.rows import ContextRows
from ...privacy.bits import SeededEntropy
from .objective import Objective, fvu, fvu_interval
from .slots_fit import PublicContexts


def judge(
    plan: AnchorPlan,
    config: DPXAttnConfig,
    decoders: Decoders,
    validation: PublicContexts,
    objective: Objective,
) -> AnchorPlan:
    """The plan with its predicted quality: real releases (seeded noise) of held-out public contexts."""
    decoded = simulate(plan, config, decoders, validation)
    errors, variances = objective.measure(
        validation.whole.float(),
        [(c.rows, c.log_weights) for c in decoded],
        outputs=validation.outputs,
    )
    low, high = fvu_interval(errors, variances)
    return dataclasses.replace(plan, quality=Quality(fvu(errors, variances), low, high, len(validation)))


def simulate(
    plan: AnchorPlan, config: DPXAttnConfig, decoders: Decoders, contexts: PublicContexts, *, seed: int = 1
) -> list[ContextRows]:
    """Decoded rows of PUBLIC contexts through the mechanism itself, with seeded noise. A pooled unit is one row to it."""
    prepared = prepare_anchors(config.replace(epsilon=plan.epsilon, unit="row"), [plan], decoders)
    out = []
    for i in range(len(contexts)):
        rows = contexts.units[i][contexts.mask[i]].float()
        out.append(prepared.run_rows(rows, entropy=SeededEntropy(seed * 1_000_003 + i)).context)
    return out
