r"""Public geometry of a layer's heads: how keys, queries and values are centred, rotated and scaled before release.

Softmax does not see a shift of the keys, and a linear map may move from keys to queries, so all of this is free of privacy cost
as long as it comes from public data. With key centre c, query centre m and maps A_k, A_q with
A_q^T A_k ~ scale * I (on the directions that matter):

    scale q.k = scale q.c + scale m.(k - c) + (A_q (q - m)).(A_k (k - c))
                 (a)              (b)                    (c)

(a) is the same for all rows and returns only in the log-sum-exp; (b) is a row weight w = exp(b); (c) is the clipped logit
that the feature map sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ..base import LayerSpec
from .features import FeatureMap

MAX_LOG_WEIGHT = 4.0


@dataclass(frozen=True)
class HeadGeometry:
    """Public constants of one layer with H heads (float64 CPU tensors).

    Shapes: key_center, query_center [H, d]; key_map, query_map [H, p, d]; value_center [H, dv]; the rest [H].
    `weight_map` [H, d] gives the log row weight (b); `key_radius` * `query_radius` is the logit bound;
    `value_scale` multiplies centred values (a head's share of the joint norm) and `normalizer_weight` is the constant
    that stands beside them for the normaliser, in the same units; `key_range` bounds the entries of centred keys.
    """

    key_center: torch.Tensor
    query_center: torch.Tensor
    key_map: torch.Tensor
    query_map: torch.Tensor
    weight_map: torch.Tensor
    key_radius: torch.Tensor
    query_radius: torch.Tensor
    value_center: torch.Tensor
    value_scale: torch.Tensor
    normalizer_weight: torch.Tensor
    key_range: torch.Tensor
    scale: float

    @property
    def heads(self) -> int:
        return self.key_center.shape[0]

    @property
    def key_dim(self) -> int:
        return self.key_center.shape[1]

    @property
    def value_dim(self) -> int:
        return self.value_center.shape[1]

    @property
    def projected_dim(self) -> int:
        return self.key_map.shape[1]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scale"}

    def check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raises ConfigError unless key [..., H, n, d] and value [..., H, n, dv] fit."""
        want = (self.heads, self.key_dim, self.heads, self.value_dim)
        have = (key.shape[-3], key.shape[-1], value.shape[-3], value.shape[-1])
        if want != have:
            raise ConfigError(
                f"The calibration is for {want[0]} heads with key/value dims {want[1]}/{want[3]}, "
                f"but the layer has {have[0]} heads with {have[1]}/{have[3]}. Calibrate again for this model."
            )


def declared_geometry(
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    scale: float,
    logit_bound: float,
    value_bound: float,
    maps: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> HeadGeometry:
    """Geometry without any data: no shift, both sides clipped to norm sqrt(logit_bound). maps: of keys and queries, else sqrt(scale) I."""
    identity = torch.eye(key_dim, dtype=torch.float64).expand(heads, key_dim, key_dim) * math.sqrt(scale)
    key_map, query_map = (identity, identity) if maps is None else maps
    ones = torch.ones(heads, dtype=torch.float64)
    value_norm = value_bound * math.sqrt(value_dim)
    return HeadGeometry(
        key_center=torch.zeros(heads, key_dim, dtype=torch.float64),
        query_center=torch.zeros(heads, key_dim, dtype=torch.float64),
        key_map=key_map,
        query_map=query_map,
        weight_map=torch.zeros(heads, key_dim, dtype=torch.float64),
        key_radius=ones * math.sqrt(logit_bound),
        query_radius=ones * math.sqrt(logit_bound),
        value_center=torch.zeros(heads, value_dim, dtype=torch.float64),
        value_scale=ones,
        normalizer_weight=ones * value_norm / value_dim**0.25,
        key_range=ones * 64.0,
        scale=scale,
    )


def balance(
    key_cov: torch.Tensor, query_cov: torch.Tensor, scale: float, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps [H, p, d] that make the second moments of q and k equal and keep the p directions in which q.k varies most.

    With K = key_cov^(1/2), Q = query_cov^(1/2) and the SVD Q K = U S V^T: A_k = (scale S)^(1/2) V^T K^-1 and
    A_q = (scale S)^(1/2) U^T Q^-1 give A_q^T A_k = scale I at full rank, E|A_k k|^2 = E|A_q q|^2 = scale sum S, and the logit's variance
    is sum (scale S_j)^2: the first p directions are the best ones.

    Returns:
        key_map, query_map [H, p, d] and the singular values scale * S [H, d].
    """
    d = key_cov.shape[-1]
    p = d if dim == 0 else min(dim, d)

    def roots(cov: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, vectors = torch.linalg.eigh(cov.to(torch.float64))
        values = values.clamp_min(1e-6 * values.amax(-1, keepdim=True).clamp_min(1e-12))
        half = values.sqrt().unsqueeze(-2)
        return (vectors * half) @ vectors.mT, (vectors / half) @ vectors.mT

    k_root, k_inverse = roots(key_cov)
    q_root, q_inverse = roots(query_cov)
    u, s, vt = torch.linalg.svd(q_root @ k_root)
    weight = (scale * s[..., :p]).sqrt().unsqueeze(-1)
    return weight * (vt[..., :p, :] @ k_inverse), weight * (u.mT[..., :p, :] @ q_inverse), scale * s


def weights_geometry(
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    value_dim: int,
    *,
    scale: float,
    logit_bound: float,
    value_bound: float,
    projection_dim: int,
) -> HeadGeometry:
    """Geometry from a layer's public weights alone (to_q, to_k as [H, d, channels]): the directions in which q.k
    can vary if the inputs were isotropic; bounds as in `declared_geometry`."""
    heads, d, _ = key_weight.shape
    key_cov = key_weight.double() @ key_weight.double().mT
    query_cov = query_weight.double() @ query_weight.double().mT
    key_map, query_map, _ = balance(key_cov, query_cov, scale, projection_dim)
    bounds = {"logit_bound": logit_bound, "value_bound": value_bound}
    return declared_geometry(heads, d, value_dim, scale=scale, maps=(key_map, query_map), **bounds)


def geometry_of(spec: LayerSpec, config: DPXAttnConfig) -> HeadGeometry:
    """The conservative geometry of a layer, which needs no data: from its public weights where a host gives them."""
    if spec.query_weight is None or spec.key_weight is None:
        return declared_geometry(
            spec.heads,
            spec.key_dim,
            spec.value_dim,
            scale=spec.scale,
            logit_bound=config.logit_bound,
            value_bound=config.value_bound,
        )
    return weights_geometry(
        spec.query_weight,
        spec.key_weight,
        spec.value_dim,
        scale=spec.scale,
        logit_bound=config.logit_bound,
        value_bound=config.value_bound,
        projection_dim=config.projection_dim,
    )


def feature_norm(features: FeatureMap, geometry: HeadGeometry) -> torch.Tensor:
    """[H] bound of |w phi(k)| over clipped keys (the row weight w is bounded by e^MAX_LOG_WEIGHT where it is used)."""
    norms = [features.key_norm_bound(float(r)) for r in geometry.key_radius]
    weighted = (geometry.weight_map.abs().amax(-1) > 0).double() * (MAX_LOG_WEIGHT / 2)
    return torch.tensor(norms, dtype=torch.float64) * weighted.exp()
