r"""Integer lattice: exact products and sums of private rows in float64 that holds integers.

A float64 holds every integer up to 2^53 exactly, so a matrix product of integer-valued float64 matrices is *exact*
as long as no partial sum can pass 2^53, in whatever order the library adds. Floating-point summation proper is not
associative: the sum of a context would change in the last bits with the order of its rows, with the chunk size and
with the presence of *other* rows, and a float sum has more sensitivity than its ideal (Casacuberta et al. 2022).

Everything here is deterministic per element: rounding, products, quotients and square roots are correctly rounded
by IEEE 754 whatever the vector width, so a row's integers depend on that row alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ConfigError

EXACT_LIMIT = 2**53
ENTRY_BITS = 19  # |integer entries of a contribution's two factors| <= 2^19, their products <= 2^38
ENTRY_LIMIT = 2**ENTRY_BITS
BOUND_BITS = 34  # a clipping bound is an integer of about 34 bits: products of two factors have up to 38
ROWS_PER_CHUNK: int = 2 ** (52 - 2 * ENTRY_BITS)  # 16384 products of 2^38 sum to 2^52 < 2^53


def lattice_exponent(clip_norm: float) -> int:
    """F such that clip_norm * 2^F has BOUND_BITS bits."""
    return BOUND_BITS - 1 - math.floor(math.log2(clip_norm))


def power_of_two(exponents: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """Exact float64 powers 2^e."""
    return torch.tensor([2.0**e for e in exponents], dtype=torch.float64, device=device)


def quantize(x: torch.Tensor, scale: float | torch.Tensor, limit: int = ENTRY_LIMIT) -> torch.Tensor:
    """Integers round(x * scale), clamped to [-limit, limit], held in float64. Elementwise, hence row by row.

    NaN becomes 0: whatever public numbers make of a row, the result is an integer, and no later check fails because of the row.
    """
    scaled = x.to(torch.float64) * scale
    return scaled.round_().nan_to_num_(0.0, limit, -limit).clamp_(-limit, limit)


def exact_matmul(a: torch.Tensor, b: torch.Tensor, bound: float) -> torch.Tensor:
    """Product of integer-valued float64 tensors whose partial sums cannot exceed `bound`; exact in any order.

    Raises:
        ConfigError: bound >= 2^53, so exactness could not be promised.
    """
    if not bound < EXACT_LIMIT:
        raise ConfigError(
            f"A product of up to {bound:.3g} is not exact in float64; use fewer features or dimensions."
        )
    return torch.matmul(a, b)


def exact_square_sum(x: torch.Tensor, bound: float) -> torch.Tensor:
    """Sums of squares over the last dimension of an integer-valued float64 tensor, none above `bound`; exact in any order.

    Raises:
        ConfigError: see `exact_matmul`.
    """
    if not bound < EXACT_LIMIT:
        raise ConfigError(
            f"A sum of squares of up to {bound:.3g} is not exact in float64; use fewer features."
        )
    total: torch.Tensor = torch.linalg.vecdot(x, x)
    return total


def exact_exp(x: torch.Tensor, limit: float = 8.0) -> torch.Tensor:
    """exp(clamp(x, -limit, limit)) by products and sums only, to a relative 1e-13; NaN counts as 0.

    A library's vectorised exp and its scalar remainder may differ in the last bit, so the value of a row would depend on its
    position in memory. Additions and multiplications are correctly rounded everywhere.
    """
    y = x.to(torch.float64).nan_to_num(0.0, limit, -limit).clamp(-limit, limit) * 2.0**-6
    total = torch.ones_like(y)
    for k in range(
        13, 0, -1
    ):  # Horner form of the Taylor polynomial; |y| <= 1/8 leaves a remainder below 2^-80
        total = total * (y * (1.0 / k)) + 1.0
    for _ in range(6):
        total = total * total
    return total


def sequential_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension in index order, one rounded addition at a time (a library's reduction tree may
    depend on the shape of the other dimensions, hence on the chunk size)."""
    total = torch.zeros_like(x[..., 0])
    for j in range(x.shape[-1]):
        total = total + x[..., j]
    return total
