"""Released structures: what a layer's queries read. Everything here is post-processing of a release."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from ..errors import ConfigError, ReleaseError
from .merge import exact_partial


class AttentionStructure(Protocol):
    """One layer's released structure for a batch of B contexts and H heads."""

    def partial(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H, m, d] -> (out [B, H, m, dv], lse [B, H, m]), float32 or wider, ready for the log-sum-exp merge."""
        ...

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        """[B, H, m, d] -> [B, H, m, dv] in the query's dtype."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, for saving, moving and stacking."""
        ...

    def to(self, device: torch.device | str) -> AttentionStructure: ...

    def select(self, index: torch.Tensor) -> AttentionStructure:
        """The structure of the batch elements `index` [B'] (integer tensor); no host synchronisation."""
        ...


class QueryFeatures(Protocol):
    """The queries' side of a feature map (`features.FeatureMap`, `dptree.structure.DistanceFeatures`); a dataclass that compares."""

    def query_sums(self, query: torch.Tensor, table: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Feature-major product: query [..., p, m], sums [..., r, c] -> [..., c, m]."""
        ...


def _check_query(query: torch.Tensor, batch: int, heads: int, dim: int) -> None:
    if query.ndim != 4 or query.shape[1] != heads or query.shape[-1] != dim:
        raise ConfigError(f"query must be [B, {heads}, m, {dim}], got {list(query.shape)}.")
    if query.shape[0] != batch and batch != 1:
        raise ConfigError(f"query has batch {query.shape[0]}, the structure {batch}.")


@dataclass(frozen=True)
class ExactStructure:
    """Exact attention over the rows themselves (`mechanism="none"`): NOT private, for parity tests."""

    key: torch.Tensor  # [B, H, n, d]
    value: torch.Tensor  # [B, H, n, dv]
    scale: float

    def partial(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _check_query(query, self.key.shape[0], self.key.shape[1], self.key.shape[-1])
        return exact_partial(query, self.key, self.value, self.scale)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        return self.partial(query)[0].to(query.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"key": self.key, "value": self.value}

    def to(self, device: torch.device | str) -> ExactStructure:
        return ExactStructure(self.key.to(device), self.value.to(device), self.scale)

    def select(self, index: torch.Tensor) -> ExactStructure:
        return ExactStructure(self.key.index_select(0, index), self.value.index_select(0, index), self.scale)


@dataclass(frozen=True)
class KernelSumStructure:
    """A noised kernel sum: out = phi(q)^T S[:, :-1] / phi(q)^T S[:, -1] + value_center.

    Shapes: sums [B, H, r, dv + 1] float32 (feature coefficients folded in, values centred); floor [B, H, 1] is the public or
    post-processed floor under the normaliser; query_center [H, d], query_map [H, p, d], query_radius [H],
    key_center [H, d] (times scale), value_center [H, dv]; table: the feature map's public constants.
    """

    sums: torch.Tensor
    floor: torch.Tensor
    query_center: torch.Tensor
    query_map: torch.Tensor
    query_radius: torch.Tensor
    key_center: torch.Tensor
    value_center: torch.Tensor
    table: torch.Tensor
    features: QueryFeatures
    queries_per_chunk: int = 4096

    _TENSORS = (
        "sums",
        "floor",
        "query_center",
        "query_map",
        "query_radius",
        "key_center",
        "value_center",
        "table",
    )
    _BATCHED = ("sums", "floor")

    def partial(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        _check_query(query, self.sums.shape[0], self.sums.shape[1], self.query_center.shape[-1])
        q = query.to(torch.promote_types(query.dtype, torch.float32))
        m, step = q.shape[2], self.queries_per_chunk
        if m <= step:
            return self._partial(q)
        parts = [self._partial(q[:, :, i : i + step]) for i in range(0, m, step)]
        return torch.cat([p[0] for p in parts], dim=2), torch.cat([p[1] for p in parts], dim=2)

    def _partial(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # feature-major from here on: [B, H, channels, m]
        centred = self.query_map.to(q) @ (q - self.query_center.to(q)[:, None]).mT
        norm = torch.linalg.vector_norm(centred, dim=-2, keepdim=True)
        radius = self.query_radius.to(q)[:, None, None]
        centred = centred * (radius / norm.clamp_min(1e-30)).clamp_max(1.0)
        result = self.features.query_sums(centred, self.table.to(q), self.sums.to(q))
        normalizer = torch.maximum(result[..., -1, :], self.floor.to(q))
        out = (result[..., :-1, :] / normalizer.unsqueeze(-2) + self.value_center.to(q)[:, :, None]).mT
        shift = (q @ self.key_center.to(q).unsqueeze(-1)).squeeze(-1)
        return out, shift + torch.log(normalizer)

    def attend(self, query: torch.Tensor) -> torch.Tensor:
        return self.partial(query)[0].to(query.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: getattr(self, name) for name in self._TENSORS}

    def to(self, device: torch.device | str) -> Self:
        return self._with(**{name: t.to(device) for name, t in self.tensors().items()})

    def select(self, index: torch.Tensor) -> Self:
        return self._with(**{name: getattr(self, name).index_select(0, index) for name in self._BATCHED})

    def _with(self, **changes: torch.Tensor) -> Self:
        return type(self)(
            features=self.features, queries_per_chunk=self.queries_per_chunk, **{**self.tensors(), **changes}
        )


def stack(structures: Sequence[AttentionStructure]) -> AttentionStructure:
    """Concatenates along the batch; all must come from the same layer, config and calibration.

    Raises:
        ReleaseError: they do not fit each other.
    """
    first = structures[0]
    if any(type(s) is not type(first) for s in structures):
        raise ReleaseError(
            "Releases of different mechanisms cannot be batched; call the pipeline once for each."
        )
    if isinstance(first, ExactStructure):
        exact = [s for s in structures if isinstance(s, ExactStructure)]
        if len({s.key.shape[2] for s in exact}) > 1:
            raise ReleaseError(
                "Contexts of different lengths cannot be batched; call the pipeline once for each."
            )
        return ExactStructure(
            torch.cat([s.key for s in exact]), torch.cat([s.value for s in exact]), first.scale
        )
    assert isinstance(first, KernelSumStructure)
    sums = [s for s in structures if isinstance(s, KernelSumStructure)]
    for s in sums[1:]:
        same = s.features == first.features and all(
            torch.equal(getattr(s, name), getattr(first, name))
            for name in first._TENSORS
            if name not in first._BATCHED
        )
        if not same:
            raise ReleaseError(
                "These releases were made with different configs or calibrations; batch only like ones."
            )
    return first._with(sums=torch.cat([s.sums for s in sums]), floor=torch.cat([s.floor for s in sums]))
