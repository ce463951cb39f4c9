"""Random public geometries for tests."""

from __future__ import annotations

import torch

from hf_dp_xattn.mechanisms.kernel_sum.geometry import HeadGeometry, balance


def random_geometry(
    heads: int, d: int, dv: int, *, p: int = 0, seed: int = 0, logit_bound: float = 1.0, weighted: bool = True
) -> HeadGeometry:
    gen = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    scale = d**-0.5
    cov = [c @ c.mT + 0.1 * torch.eye(d, dtype=torch.float64) for c in (rand(heads, d, d), rand(heads, d, d))]
    key_map, query_map, _ = balance(cov[0], cov[1], scale, p)
    ones = torch.ones(heads, dtype=torch.float64)
    return HeadGeometry(
        key_center=rand(heads, d),
        query_center=rand(heads, d),
        key_map=key_map,
        query_map=query_map,
        weight_map=rand(heads, d) * 0.1 if weighted else torch.zeros(heads, d, dtype=torch.float64),
        key_radius=ones * logit_bound**0.5,
        query_radius=ones * logit_bound**0.5,
        value_center=rand(heads, dv),
        value_scale=rand(heads).abs() + 0.5,
        normalizer_weight=rand(heads).abs() + 0.5,
        key_range=ones * 16,
        scale=scale,
    )


def random_rows(heads: int, n: int, d: int, dv: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(heads, n, d, generator=gen), torch.randn(heads, n, dv, generator=gen)
