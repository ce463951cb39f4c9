"""`DPTreeStructure`: what a layer's queries read of the trees, in the form of a kernel sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernel_sum.features import TaylorFeatures
from ..structure import KernelSumStructure
from .tree_attention import DPTreeCrossAttention


@dataclass(frozen=True)
class DistanceFeatures:
    """(1, y_j, y_j^2) for the coordinates y_j of P(y) but the constant one: what a sum of squared distances depends on.

    r' = 2 C(dim + degree, degree) - 1; the coefficients of P are folded into the structure.
    """

    dim: int
    degree: int

    @property
    def polynomial(self) -> TaylorFeatures:
        return TaylorFeatures(self.dim, self.degree)

    @property
    def size(self) -> int:
        return 2 * self.polynomial.size - 1

    def query_features(self, query: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[..., p] -> [..., r']."""
        monomials = self.polynomial.monomials(query)
        return torch.cat([monomials, monomials[..., 1:].square()], dim=-1)

    def query_sums(self, query: torch.Tensor, table: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Feature-major product: query [..., p, m], sums [..., r', c] -> [..., c, m]."""
        return (self.query_features(query.mT, table) @ sums).mT


@dataclass(frozen=True)
class DPTreeStructure(KernelSumStructure):
    """The answers of the trees to their one kind of query, the whole range, as coefficients of the query's features.

    The answer of `DPTreeCrossAttention` is W + (N - sum_j S_j)/2 + sum_j y_j F_j + sum_j y_j^2 (W - C_j)/2 with S, F, C the roots of the
    trees of second and first moments and of weights. The other nodes are never read for squares, so they are not kept. Post-processing.
    """


def structure_of(layer: DPTreeCrossAttention) -> DPTreeStructure:
    """The structure (batch 1, float32) that answers as `layer.query` does."""
    softmax, g = layer.softmax, layer.softmax.geometry
    total, norms, device = softmax.total, softmax.norms, softmax.total.device
    roots = {
        m: levels[-1].squeeze(-1) for m, levels in softmax.distances.distance.levels.items()
    }  # [H, r, c]
    fold = softmax.features.coefficients().to(device)[1:, None]
    sums = torch.cat(
        [
            (total + 0.5 * (norms - roots["second"].sum(1))).unsqueeze(1),
            roots["first"] * fold,
            0.5 * (total.unsqueeze(1) - roots["weights"]) * fold.square(),
        ],
        dim=1,
    )
    scale = torch.cat(
        [layer.value_scale[:, None].expand(-1, g.value_dim), layer.normalizer_scale[:, None]], 1
    )
    sums = sums / scale[:, None]

    def public(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, torch.float32)

    return DPTreeStructure(
        sums=public(sums).unsqueeze(0),
        floor=public(layer.floor).reshape(1, g.heads, 1),
        query_center=public(g.query_center),
        query_map=public(g.query_map),
        query_radius=public(g.query_radius),
        key_center=public(g.key_center * g.scale),
        value_center=public(g.value_center),
        table=sums.new_zeros(0, dtype=torch.float32),
        features=DistanceFeatures(softmax.features.dim, softmax.features.degree),
    )
