r"""What a context's mean code says beyond its cells: all anchors are moved by a public linear map of it. Post-processing.

With w_c the posterior weights of the cells, z_c the mean code of the public rows in cell c, and ybar the noised mean code of n rows, whose
noise has standard deviation s in every coordinate,

    r = ybar - sum_c w_c z_c / sum_c w_c,        move = B (S + s^2 I)^-1 r.

S [K, K] and B [C, K] are second moments over public contexts, at exact counts: of r, and of r with the move that is wanted (the context's
mean row less the anchors' weighted mean). So it is the linear least-squares estimate of what the cells leave out, and it tends to 0 as the
noise grows. *Source:* ours; least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RowMove:
    """scale []: from the codebook's coordinates to codes in the unit ball. codes [m, K]: z_c. cross [C, K]: B. moment [K, K]: S."""

    scale: torch.Tensor
    codes: torch.Tensor
    cross: torch.Tensor
    moment: torch.Tensor

    TENSORS = ("scale", "codes", "cross", "moment")

    def residual(self, mean_code: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """ybar [..., K] and weights [..., m] -> r [..., K] float64."""
        weights = weights.double()
        shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-30)
        return mean_code.double() - shares @ self.codes.double()

    def shift(self, mean_code: torch.Tensor, weights: torch.Tensor, noise: float) -> torch.Tensor:
        """What is added to every anchor, [C] float32. mean_code [K]: ybar; weights [m]; noise: s."""
        moment = self.moment.double() + noise**2 * torch.eye(len(self.moment), dtype=torch.float64)
        solution = torch.linalg.solve(moment, self.residual(mean_code, weights))
        step: torch.Tensor = self.cross.double() @ solution
        return step.float()
