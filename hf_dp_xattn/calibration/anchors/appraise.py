"""What the plans of a calibration that exists are worth beside no release, from public contexts that it was not fitted to.

For calibrations of before plans said so. Nothing that a release reads is changed: the rows that a release is decoded to stay the same, bit
for bit, and only `worth` and the fall-back that it was compared with are new.
"""

from __future__ import annotations

import dataclasses

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...mechanisms.anchors.fallback import Worth
from ...mechanisms.anchors.plan import AnchorPlan
from ..public_data import PublicData
from .anchors_calibration import AnchorCalibration
from .fallback_fit import fit_fallback
from .held_out import HeldOut, kinds_of
from .intervals import ratio_interval
from .judge import Jury

_KINDS = 24
_FEWEST = 40


def appraise(
    calibration: AnchorCalibration, config: DPXAttnConfig, data: PublicData, *, seed: int = 0
) -> AnchorCalibration:
    """The calibration, with what each plan is worth. Half of the contexts make the fall-back, the others judge.

    Args:
        calibration: of this host.
        config: unit, relation and delta that it was fitted for.
        data: fresh public contexts, as the host gives them.
        seed: of the choice of contexts and queries.

    Raises:
        ConfigError: too few contexts; plans that say already what they are worth.
    """
    contexts = data.contexts
    if contexts is None or len(contexts) < _FEWEST:
        raise ConfigError(f"To say what a calibration is worth takes at least {_FEWEST} public contexts.")
    if any(plan.worth is not None for plan in calibration.plans):
        raise ConfigError("The plans of this calibration say already what they are worth.")
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(seed))
    first, rest = (contexts.part(part) for part in order.chunk(2))
    fallback = fit_fallback(first, data.objective, seed=seed)
    kinds = kinds_of(rest, max(4, min(_KINDS, len(rest) // 4)), seed)
    held = HeldOut(first, first.part(torch.arange(0)), rest, kinds, torch.zeros(len(rest), dtype=torch.bool))
    jury = Jury(config, held, data.objective, fallback)
    none = jury.scores(jury.nothing).unsqueeze(1)

    def judged(plan: AnchorPlan) -> AnchorPlan:
        scores = jury.scores(jury.judge(plan, calibration.decoders).measured).unsqueeze(1)
        # one side of 95 %: the upper end of 90 %
        ratio, _, high = ratio_interval(scores, none, kinds, 0.9)
        bound = round(min(high, 1e9), 4)
        worth = Worth(jury.against, 1.0, jury.measure, round(ratio, 4), bound, unseen_kinds=False)
        return dataclasses.replace(plan, worth=worth)

    decoders = dataclasses.replace(calibration.decoders, fallback=fallback)
    plans = tuple(judged(plan) for plan in calibration.plans)
    appraised = dataclasses.replace(calibration, plans=plans, decoders=decoders)
    appraised.verify()
    return appraised
