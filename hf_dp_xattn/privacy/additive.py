"""Additive integer noise: a sampler beside its law, for releases, decoders and audits alike."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch

from .accountant import Event, GaussianEvent, PureEvent, TruncatedLaplaceEvent
from .bits import Entropy
from .noise import discrete_gaussian, discrete_geometric
from .truncated_laplace import truncated_laplace

_SAMPLER_RATE = 8  # the sampler's scales are at least 1/8


class AdditiveNoise(ABC):
    """Independent noise on every coordinate, in lattice steps."""

    @abstractmethod
    def sample(self, size: int, entropy: Entropy) -> torch.Tensor:
        """int64 [size]."""

    @abstractmethod
    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        """log P(z) up to a constant, float64; -inf outside of the support."""

    @abstractmethod
    def gap(self, difference: torch.Tensor, event: Event) -> float:
        """How large a difference of two sums, int64 [D], is as a share of what the event is charged for; above 1 nothing holds."""

    def perturb(self, integers: torch.Tensor, entropy: Entropy) -> torch.Tensor:
        """int64 of any shape -> the same with noise on each entry."""
        return integers + self.sample(integers.numel(), entropy).view(integers.shape).to(integers.device)


def _one_sided(size: int, rate: Fraction, entropy: Entropy) -> np.ndarray:
    """P(j) ~ exp(-rate j), j >= 0. The smallest of s samples of rate/s: P(min >= j) = exp(-j rate / s)^s."""
    parts = math.ceil(rate / _SAMPLER_RATE)
    draws = [discrete_geometric(size, parts / rate, entropy=entropy) for _ in range(parts)]
    least: npt.NDArray[np.int64] = np.minimum.reduce(draws)
    return least


@dataclass(frozen=True)
class GeometricNoise(AdditiveNoise):
    """P(z) ~ exp(-rate_plus z) for z >= 0, exp(-rate_minus |z|) for z < 0; rates per lattice step, exact."""

    rate_plus: Fraction
    rate_minus: Fraction

    def sample(self, size: int, entropy: Entropy) -> torch.Tensor:
        return torch.from_numpy(
            _one_sided(size, self.rate_plus, entropy) - _one_sided(size, self.rate_minus, entropy)
        )

    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        steps = z.to(torch.float64)
        return -float(self.rate_plus) * steps.clamp_min(0.0) + float(self.rate_minus) * steps.clamp_max(0.0)

    def gap(self, difference: torch.Tensor, event: Event) -> float:
        assert isinstance(event, PureEvent)
        up, down = int(difference.clamp_min(0).sum()), int((-difference).clamp_min(0).sum())
        plus, minus = self.rate_plus, self.rate_minus
        return float(max(up * plus + down * minus, up * minus + down * plus) / event.epsilon)


@dataclass(frozen=True)
class GaussianNoise(AdditiveNoise):
    """P(z) ~ exp(-z^2 / (2 sigma_squared))."""

    sigma_squared: int | Fraction

    def sample(self, size: int, entropy: Entropy) -> torch.Tensor:
        return torch.from_numpy(discrete_gaussian(size, self.sigma_squared, entropy=entropy))

    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        return z.to(torch.float64).square() * (-0.5 / float(self.sigma_squared))

    def gap(self, difference: torch.Tensor, event: Event) -> float:
        assert isinstance(event, GaussianEvent)
        return float(difference.double().norm()) / event.sensitivity


@dataclass(frozen=True)
class TruncatedLaplaceNoise(AdditiveNoise):
    """P(z) ~ exp(-|z| / scale) for |z| <= bound, 0 beyond."""

    scale: int | Fraction
    bound: int

    def sample(self, size: int, entropy: Entropy) -> torch.Tensor:
        return torch.from_numpy(truncated_laplace(size, Fraction(self.scale), self.bound, entropy=entropy))

    def log_weight(self, z: torch.Tensor) -> torch.Tensor:
        steps = z.abs()
        return (steps.to(torch.float64) / -float(self.scale)).masked_fill(steps > self.bound, -torch.inf)

    def gap(self, difference: torch.Tensor, event: Event) -> float:
        assert isinstance(event, TruncatedLaplaceEvent)
        l1, largest, squared = event.shape
        steps = difference.abs()
        norm = float(steps.double().square().sum() / float(squared)) ** 0.5
        # all three must hold; the price is that of the norm, as long as they do
        others = max(int(steps.sum()) / l1, int(steps.max()) / largest) if len(steps) else 0.0
        return others if norm <= 1 < others else norm
