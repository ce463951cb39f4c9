"""Streaming first and second moments of public keys, values and queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Mean and covariance of [H, n, d] rows, accumulated in float64."""

    count: int = 0
    total: torch.Tensor | None = None
    product: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        wide = x.detach().to(torch.float64)
        total, product = wide.sum(1), wide.mT @ wide
        self.count += wide.shape[1]
        self.total = total if self.total is None else self.total + total
        self.product = product if self.product is None else self.product + product

    @property
    def mean(self) -> torch.Tensor:
        """[H, d]"""
        assert self.total is not None and self.count
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """[H, d, d], centred."""
        assert self.product is not None
        mean = self.mean
        return self.product / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
