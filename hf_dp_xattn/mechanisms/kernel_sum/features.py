r"""Feature maps phi with <phi(x), phi(y)> ~ exp(<x, y>) on the declared range |<x, y>| <= b.

*Taylor* (the paper's polynomial kernel method, arXiv 2407.14717, section 4; Alman and Song 2023): with monomials
x^alpha of degree j <= s and coefficients sqrt(1/alpha!), <phi(x), phi(y)> = sum_{j<=s} <x,y>^j / j!. Symmetric
compression keeps each monomial once: r = C(p + s, s) instead of (1 + p + ... + p^s).

*Positive random features* (FAVOR+, Choromanski et al. 2021, arXiv 2009.14794): phi_j(x) = exp(<w_j, x> - |x|^2/2)/sqrt(m), w_j
Gaussian in orthogonal blocks; unbiased for exp(<x, y>), always positive. The directions come from a public seed.

Both have two sides. `key_features` runs on PRIVATE rows: float64, elementwise operations and exact integer products only, so
that a row's features depend on that row alone, bit for bit. `query_features` runs on queries in any dtype and may be fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement

import torch

from ...config import DPXAttnConfig
from ...errors import ConfigError
from ...privacy.lattice import exact_exp, exact_matmul, quantize

MAX_FEATURES = 2**17
QUERY_BLOCK = 1024


def taylor_relative_error(bound: float, degree: int) -> float:
    """eps_s: the largest |P_s(x) / e^x - 1| over |x| <= bound, P_s the Taylor polynomial of degree s.

    P_s(x) e^-x has the derivative -x^s e^-x / s!, so it is monotone on each side of 0 and the largest error is at an end.
    """

    def error(x: float) -> float:
        return abs(sum(x**j / math.factorial(j) for j in range(degree + 1)) / math.exp(x) - 1.0)

    return max(error(-bound), error(bound))


def number_of_monomials(dim: int, degree: int) -> int:
    return math.comb(dim + degree, degree)


@dataclass(frozen=True)
class TaylorFeatures:
    """Symmetric Taylor features of `dim` coordinates up to `degree`; r = C(dim + degree, degree).

    The monomials of degree j are sorted by their first index, so those of degree j + 1 that start with
    coordinate i are x_i times a contiguous suffix of degree j: no gather, no d^s intermediate.
    """

    dim: int
    degree: int
    has_constant = True  # feature 0 is the constant 1

    def __post_init__(self) -> None:
        if self.size > MAX_FEATURES:
            raise ConfigError(
                f"degree {self.degree} on {self.dim} dimensions needs {self.size} features per head; lower `degree`, or set "
                "`projection_dim` (hosts), or use features='positive_random'."
            )

    @property
    def size(self) -> int:
        return number_of_monomials(self.dim, self.degree)

    def coefficients(self) -> torch.Tensor:
        """[r] sqrt(1/alpha!) in the order of the monomials."""
        values = [1.0]
        for j in range(1, self.degree + 1):
            for index in combinations_with_replacement(range(self.dim), j):
                counts = [index.count(i) for i in set(index)]
                values.append(1.0 / math.sqrt(math.prod(math.factorial(c) for c in counts)))
        return torch.tensor(values, dtype=torch.float64)

    def monomials(self, x: torch.Tensor) -> torch.Tensor:
        """[..., p] -> [..., r], elementwise products only."""
        blocks = [torch.ones_like(x[..., :1])]
        if self.degree >= 1:
            blocks.append(x)
        for j in range(2, self.degree + 1):
            previous = blocks[-1]
            total = previous.shape[-1]
            parts = []
            for i in range(self.dim):
                # monomials of degree j-1 whose indices are all >= i: a suffix, C(p - i + j - 2, j - 1) long
                length = math.comb(self.dim - i + j - 2, j - 1)
                parts.append(previous[..., total - length :] * x[..., i : i + 1])
            blocks.append(torch.cat(parts, dim=-1))
        return torch.cat(blocks, dim=-1)

    def key_features(self, key: torch.Tensor) -> torch.Tensor:
        """[..., p] float64 -> [..., r] float64, deterministic per row."""
        out = key.new_empty(*key.shape[:-1], self.size)
        out[..., 0] = 1.0
        stop = 1
        for j in range(1, self.degree + 1):
            position = stop
            for i in range(self.dim):
                # monomials of degree j-1 whose indices are all >= i: a suffix, C(p - i + j - 2, j - 1) long
                length = math.comb(self.dim - i + j - 2, j - 1)
                suffix = out[..., stop - length : stop] if j > 1 else out[..., :1]
                torch.mul(suffix, key[..., i : i + 1], out=out[..., position : position + length])
                position += length
            stop = position
        return out.mul_(self.coefficients().to(key.device))

    def query_table(self) -> torch.Tensor:
        """Public constants that `query_features` needs on the device: none."""
        return torch.zeros(0)

    def query_features(self, query: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """[..., p] -> [..., r]: the bare monomials; the coefficients are folded into the structure."""
        return self.monomials(query)

    def query_sums(self, query: torch.Tensor, table: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Feature-major product: query [..., p, m], sums [..., r, c] -> [..., c, m].

        Outside of a trace, the monomials of a few hundred queries at a time are written into one buffer that stays in the
        cache; `query_features` would write m r numbers to memory in p pieces.
        """
        if torch.compiler.is_compiling() or self.degree < 2 or query.requires_grad:
            return (self.query_features(query.mT, table) @ sums).mT
        batch = torch.broadcast_shapes(query.shape[:-2], sums.shape[:-2])
        x = query.expand(*batch, *query.shape[-2:]).flatten(0, -3)  # [G, p, m]
        folded = sums.expand(*batch, *sums.shape[-2:]).flatten(0, -3).mT  # [G, c, r]
        out = x.new_empty(x.shape[0], folded.shape[1], x.shape[2])
        buffer = x.new_empty(x.shape[0], self.size, min(QUERY_BLOCK, x.shape[2]))
        buffer[:, 0] = 1.0
        for start in range(0, x.shape[2], QUERY_BLOCK):
            block = x[:, :, start : start + QUERY_BLOCK]
            features = buffer[:, :, : block.shape[2]]
            self._write_monomials(block, features)
            out[:, :, start : start + QUERY_BLOCK] = torch.bmm(folded, features)
        result: torch.Tensor = out.unflatten(0, batch)
        return result

    def _write_monomials(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [G, p, m] -> out [G, r, m] (row 0, the constant, is there already)."""
        stop = 1 + self.dim
        out[:, 1:stop] = x
        for j in range(2, self.degree + 1):
            position = stop
            for i in range(self.dim):
                length = math.comb(self.dim - i + j - 2, j - 1)
                target = out[:, position : position + length]
                torch.mul(out[:, stop - length : stop], x[:, i : i + 1], out=target)
                position += length
            stop = position

    def query_fold(self) -> torch.Tensor:
        """[r] factor by which the released structure's rows are multiplied once."""
        return self.coefficients()

    def key_norm_bound(self, radius: float) -> float:
        """max |phi(k)| over |k| <= radius: |phi(k)|^2 = P_s(|k|^2)."""
        return math.sqrt(sum(radius ** (2 * j) / math.factorial(j) for j in range(self.degree + 1)))


@lru_cache(maxsize=64)
def _orthogonal_directions(dim: int, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    blocks, left = [], count
    while left > 0:
        gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        orthogonal, upper = torch.linalg.qr(gaussian)
        orthogonal = (
            orthogonal * upper.diagonal().sign()
        )  # Haar-distributed, so that each direction is Gaussian
        lengths = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1)
        blocks.append((orthogonal * lengths[:, None])[: min(left, dim)])
        left -= dim
    return torch.cat(blocks)


@dataclass(frozen=True)
class PositiveRandomFeatures:
    """FAVOR+ features with orthogonal directions from a public seed (not part of the privacy argument)."""

    dim: int
    count: int
    seed: int = 0
    has_constant = False

    @property
    def size(self) -> int:
        return self.count

    def directions(self) -> torch.Tensor:
        """[m, p] rows of orthogonal blocks, each with the length of a Gaussian vector."""
        return _orthogonal_directions(self.dim, self.count, self.seed)

    def key_features(self, key: torch.Tensor) -> torch.Tensor:
        """[..., p] float64 -> [..., m] float64; the exponent is clamped to [-8, 8]."""
        x = quantize(key, 2.0**18, 2**21)
        w = quantize(self.directions().to(key.device), 2.0**14, 2**20)
        logits = exact_matmul(x, w.T, self.dim * 2.0**41) * 2.0**-32
        half_norm = exact_matmul(x.square(), x.new_ones(x.shape[-1], 1), self.dim * 2.0**42) * 2.0**-37
        return exact_exp(logits - half_norm) * (1.0 / math.sqrt(self.count))

    def query_table(self) -> torch.Tensor:
        return self.directions()

    def query_features(self, query: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        logits = query @ table.T
        return torch.exp((logits - 0.5 * query.square().sum(-1, keepdim=True)).clamp(-8.0, 8.0))

    def query_sums(self, query: torch.Tensor, table: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        """Feature-major product: query [..., p, m], sums [..., r, c] -> [..., c, m]."""
        return (self.query_features(query.mT, table) @ sums).mT

    def query_fold(self) -> torch.Tensor:
        return torch.full((self.count,), 1.0 / math.sqrt(self.count), dtype=torch.float64)

    def key_norm_bound(self, radius: float) -> float:
        """A public scale for the integer grid, not a bound that privacy rests on (entries are clamped, units clipped)."""
        # E exp(2 w.k - |k|^2) = exp(|k|^2) for Gaussian w; half as much again for its fluctuation
        return 1.5 * math.exp(min(0.5 * radius**2, 8.0))


FeatureMap = TaylorFeatures | PositiveRandomFeatures


def features_of(config: DPXAttnConfig, dim: int) -> FeatureMap:
    """The feature map of `config` on keys of `dim` dimensions."""
    return make_features(
        config.features,
        dim,
        degree=config.degree,
        num_features=config.num_features,
        seed=config.feature_seed,
    )


def make_features(kind: str, dim: int, *, degree: int, num_features: int, seed: int) -> FeatureMap:
    if kind == "taylor":
        return TaylorFeatures(dim, degree)
    if kind == "positive_random":
        return PositiveRandomFeatures(dim, num_features, seed)
    raise ConfigError(f"Unknown features {kind!r}; choose taylor or positive_random.")
