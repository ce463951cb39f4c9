"""Releases of PUBLIC contexts through the mechanism itself, with seeded noise. A pooled unit is one row to it."""

from __future__ import annotations

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.anchors import prepare_anchors
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from ...mechanisms.context_rows import ContextRows
from ...privacy.bits import SeededEntropy
from .slots_fit import PublicContexts


def simulate(
    plan: AnchorPlan, config: DPXAttnConfig, decoders: Decoders, contexts: PublicContexts, *, seed: int = 1
) -> list[ContextRows]:
    """Decoded rows of these contexts."""
    prepared = prepare_anchors(config.replace(epsilon=plan.epsilon, unit="row"), [plan], decoders)
    out = []
    for i in range(len(contexts)):
        rows = contexts.units[i][contexts.mask[i]].float()
        released = prepared.run(rows, entropy=SeededEntropy(seed * 1_000_003 + i))
        assert released.context is not None
        out.append(released.context)
    return out


def released_features(
    plan: AnchorPlan, config: DPXAttnConfig, decoders: Decoders, contexts: PublicContexts, *, seed: int
) -> torch.Tensor:
    """[N, F]: what `Likeness` reads of the same releases as `simulate`'s."""
    prepared = prepare_anchors(config.replace(epsilon=plan.epsilon, unit="row"), [plan], decoders)
    features = []
    for i in range(len(contexts)):
        rows = contexts.units[i][contexts.mask[i]].float()
        noised = prepared.noise(prepared.exact(rows, None), SeededEntropy(seed * 1_000_003 + i))
        features.append(prepared.features(prepared.code(noised, len(rows))))
    return torch.stack(features).float()
