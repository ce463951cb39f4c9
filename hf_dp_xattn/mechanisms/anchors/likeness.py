r"""Whether a release looks like those of public contexts: post-processing, from the released numbers alone.

A decoder has learned what public contexts look like. Of a context unlike all of them (noise, one row again and again, rows of everything
at once) it makes a public-looking one all the same, which can be further off than no release. The noised code y tells: with m the mean of
public codes and z the directions in which they vary by more than the noise, each brought to unit variance, of which a share nu is noise,

    s(y) = sum_k w_k z_k(y - m)^2 / sum_k w_k,    w_k = 1 - nu_k,

is 1 on average over public contexts; too little means that no topic stands out, too much that something unheard of does. Outside of
[low, high], which held-out public contexts keep to, the fall-back stands in place of the decoded rows.

*Formal guarantee.* s reads the release and public numbers, so that what is decoded is a function of the release (post-processing): it
costs nothing, and the guarantee is that of the release.

*Another epsilon than the plan's.* Noise of r times the variance: z_k has the variance v_k = 1 + nu_k (r - 1), and z_k^2 / v_k counts with
the weight w_k / v_k, the share of the signal in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Likeness:
    """center [F] of public features, axes [r, F] to unit variance, noise [r]: the share nu of each; low, high []: limits of s."""

    center: torch.Tensor
    axes: torch.Tensor
    noise: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    TENSORS = ("center", "axes", "noise", "low", "high")

    def statistic(self, features: torch.Tensor, ratio: float = 1.0) -> torch.Tensor:
        """s [...] of features [..., F] of releases.

        Args:
            features: what a release says, as the plan's source reads it.
            ratio: the variance of its noise over that of the plan's own.
        """
        z = (features.to(self.center) - self.center) @ self.axes.mT
        variance = 1.0 + self.noise * (ratio - 1.0)
        weight = (1.0 - self.noise) / variance
        return (z.square() * (weight / variance)).sum(-1) / weight.sum()

    def holds(self, features: torch.Tensor, ratio: float = 1.0) -> bool:
        """Whether a release with these features [F] is like public ones."""
        statistic = float(self.statistic(features, ratio))
        return float(self.low) <= statistic <= float(self.high)
