"""`Likeness` of a plan: what its releases of public contexts have in common, from simulated releases with fresh noise.

Two releases of the same context tell noise from what the context says: with d the difference of their features, E[d d^T] / 2 is the
covariance of the noise, and the covariance between both that of the contexts. Directions are those of the generalised eigenproblem.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.likeness import Likeness
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from .simulated import released_features
from .slots_fit import PublicContexts

CONTEXTS = 384
_RIDGE = 1e-4
OPEN = 1e9
_LOWS, _HIGHS = 24, 4
_USUAL = 0.97  # share of public releases that are below the least upper limit


@torch.no_grad()
def fit_likeness(first: torch.Tensor, second: torch.Tensor) -> Likeness | None:
    """Without limits yet; None where releases tell nothing but noise.

    Args:
        first: [N, F] features of releases of public contexts.
        second: [N, F] of other releases of the same ones.
    """
    center = torch.cat([first, second]).mean(0)
    a, b = (first - center).double(), (second - center).double()
    noise = (a - b).mT @ (a - b) / (2 * len(a))
    both = (a.mT @ b + b.mT @ a) / (2 * len(a))
    eye = torch.eye(len(center), dtype=torch.float64)
    total = (both + noise).diagonal().mean().clamp_min(1e-30)
    root = torch.linalg.cholesky(noise + _RIDGE * total * eye)
    half = torch.linalg.solve_triangular(root, both, upper=False)
    values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(root, half.mT, upper=False))
    share = 1.0 / (1.0 + values.clamp_min(0.0))
    # what noise alone comes to, of so many numbers and contexts
    kept = values > 2.0 * (len(center) / len(a)) ** 0.5
    if not bool(kept.any()):
        return None
    axes = torch.linalg.solve_triangular(root.mT, vectors, upper=True).mT * share.sqrt().unsqueeze(1)
    return Likeness(
        center,
        axes[kept].float(),
        share[kept].float(),
        torch.tensor(0.0),
        torch.tensor(OPEN),
    )


def with_limits(likeness: Likeness, low: float, high: float) -> Likeness:
    """The likeness with these limits of its statistic.

    Args:
        likeness: of the plan.
        low: less says too little.
        high: more says too much; `OPEN`: nothing does.
    """
    return dataclasses.replace(likeness, low=torch.tensor(low), high=torch.tensor(high))


def limits_between(public: torch.Tensor, unlike: Sequence[torch.Tensor]) -> list[tuple[float, float]]:
    """Pairs of limits that are worth a try, the lower one rising: from below everything to the public median, from all to most.

    Args:
        public: statistics of releases of public contexts that nothing was fitted to, of any shape.
        unlike: those of each kind of unlike contexts.
    """
    everything = torch.cat([public.flatten(), *unlike]).clamp_min(1e-6)
    middle = public.median().clamp_min(1e-6)
    lowest, highest = everything.min().clamp_max(middle), everything.max().clamp_min(2 * middle)
    lows = torch.logspace(float(lowest.log10()), float(middle.log10()), _LOWS).tolist()
    usual = max(float(middle), float(torch.quantile(public, _USUAL)))
    highs = torch.logspace(math.log10(usual), float(highest.log10()), _HIGHS).tolist()
    return [(low, high) for high in (OPEN, *highs) for low in (0.0, *lows)]


def outside(likeness: Likeness, statistic: torch.Tensor) -> torch.Tensor:
    """[N] bool: which releases give the fall-back."""
    return (statistic < likeness.low) | (statistic > likeness.high)


def likeness_of(
    plan: AnchorPlan,
    config: DPXAttnConfig,
    decoders: Decoders,
    contexts: PublicContexts,
    seeds: Sequence[int],
) -> Likeness | None:
    """Fitted to public contexts, for this plan.

    Args:
        plan: of any release.
        config: of the fit.
        decoders: that serve the plan.
        contexts: those that the plan was fitted to.
        seeds: of two releases of each.
    """
    some = contexts.part(torch.arange(min(CONTEXTS, len(contexts))))
    first, second = (released_features(plan, config, decoders, some, seed=s) for s in seeds)
    return fit_likeness(first, second)
