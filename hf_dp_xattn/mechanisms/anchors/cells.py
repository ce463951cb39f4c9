r"""Cell decoder: from a noised histogram to weights on public anchor rows. Post-processing.

*Per-cell posterior.* Y_c = N_c + Z_c with the geometric noise of `histogram.py` and a public prior p_c over a grid of counts v:
P(v | Y_c) ~ p_c(v) l(Y_c - v), log l(z) = -e_plus z for z >= 0 and -e_minus |z| below. An anchor's weight is its posterior mean.

*Tilt* (joint). The cells of one context vary together, so the prior is tilted: p_c(v) exp(Delta_c min(v, 3)), Delta = U g(z), z the code
of the posterior means and g a small network; trained on public contexts with fresh noise (loss: -log posterior of the true counts).

*Anchors.* Each cell stands for one or several public rows (`anchors` [m, a, C]: its mean, or public rows that fell into it), which share
its weight. With several, attention runs over public rows that are reweighted to the private histogram.

*Pruning.* The heaviest rows stay; what is left in the tail is merged by public coarse groups into weighted mean rows, so no mass is lost
and at epsilon near 0, where all cells have their prior's weight, the merged rows are the public mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..context_rows import ContextRows


@dataclass(frozen=True, eq=False)
class Tilt:
    """inner [G, K], inner_bias [G], outer [r, G], cells [m, r], scale []: Delta = cells (outer gelu(inner z / scale + inner_bias))."""

    inner: torch.Tensor
    inner_bias: torch.Tensor
    outer: torch.Tensor
    cells: torch.Tensor
    scale: torch.Tensor

    TENSORS = ("inner", "inner_bias", "outer", "cells", "scale")

    def shift(self, code: torch.Tensor) -> torch.Tensor:
        """[..., K] -> Delta [..., m]."""
        h = F.gelu(F.linear(code / self.scale, self.inner, self.inner_bias))
        return F.linear(F.linear(h, self.outer), self.cells)


@dataclass(frozen=True, eq=False)
class CellDecoder:
    """anchors [m, a, C], coarse [m] (public group of each cell), support [J] counts, log_prior [m, J]; rows: cells that stay
    unmerged."""

    anchors: torch.Tensor
    coarse: torch.Tensor
    support: torch.Tensor
    log_prior: torch.Tensor
    rows: int = 48

    TENSORS = ("anchors", "coarse", "support", "log_prior")

    def log_likelihood(self, noised: torch.Tensor, rates: tuple[float, float]) -> torch.Tensor:
        """[..., m] noised counts -> [..., m, J], up to a constant. rates: (e_plus, e_minus) of the noise."""
        difference = noised.to(torch.float32).unsqueeze(-1) - self.support
        return torch.where(difference >= 0, -rates[0] * difference, rates[1] * difference)

    def posterior(
        self, noised: torch.Tensor, rates: tuple[float, float], shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """log P(count = support_j | noised), [..., m, J]; shift: Delta [..., m] of a tilt."""
        logits = self.log_prior + self.log_likelihood(noised, rates)
        if shift is not None:
            logits = logits + shift.unsqueeze(-1) * self.support.clamp_max(3.0)
        return torch.log_softmax(logits, dim=-1)

    def weights(
        self, noised: torch.Tensor, rates: tuple[float, float], codes: torch.Tensor, tilt: Tilt | None = None
    ) -> torch.Tensor:
        """Posterior mean counts [..., m]; codes [m, K] are the cells' codes, read by the tilt."""
        mean = self.posterior(noised, rates).exp() @ self.support
        if tilt is None:
            return mean
        return self.posterior(noised, rates, tilt.shift(mean @ codes)).exp() @ self.support

    @torch.no_grad()
    def decode(self, weights: torch.Tensor) -> ContextRows:
        """[m] posterior mean counts -> the heaviest anchors and the merged tail."""
        m, a, channels = self.anchors.shape
        heavy = min(m, self.rows)
        order = torch.argsort(weights, descending=True, stable=True)
        top, tail = order[:heavy], order[heavy:]
        rows = [self.anchors[top].reshape(-1, channels)]
        mass = [(weights[top] / a).repeat_interleave(a)]
        if len(tail):
            groups = int(self.coarse.max()) + 1
            total = torch.zeros(groups).index_add_(0, self.coarse[tail], weights[tail])
            means = torch.zeros(groups, channels).index_add_(
                0, self.coarse[tail], self.anchors[tail].mean(1) * weights[tail].unsqueeze(1)
            )
            used = total > 0
            rows.append(means[used] / total[used].unsqueeze(1))
            mass.append(total[used])
        return ContextRows(torch.cat(rows), torch.log(torch.cat(mass).clamp_min(1e-30)))
