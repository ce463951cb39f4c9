"""`Likeness` of a plan: what its releases of public contexts have in common, from simulated releases with fresh noise.

Two releases of the same context tell noise from what the context says: with d the difference of their features, E[d d^T] / 2 is the
covariance of the noise, and the covariance between both that of the contexts. Directions are those of the generalised eigenproblem.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...config import DPXAttnConfig
from ...mechanisms.anchors.likeness import Likeness
from ...mechanisms.anchors.plan import AnchorPlan, Decoders
from .simulated import released_features
from .slots_fit import PublicContexts

CONTEXTS = 384
_RIDGE = 1e-4
_OPEN = 1e9


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
        torch.tensor(_OPEN),
    )


def with_limits(likeness: Likeness, statistic: torch.Tensor, below: float, above: float) -> Likeness:
    """The likeness whose limits miss so large shares of public releases.

    Args:
        likeness: of the plan.
        statistic: [N] of its releases of public contexts that nothing was fitted to.
        below: the share that says too little; 0: none does.
        above: the share that says too much; 0: none does.
    """
    low = torch.quantile(statistic, below) if below else torch.tensor(0.0)
    high = torch.quantile(statistic, 1.0 - above) if above else torch.tensor(_OPEN)
    return dataclasses.replace(likeness, low=low.float(), high=high.float())


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
