r"""From a private row to integers, and to its nearest public code: exact, and a function of that row alone, bit for bit.

A float GEMM may round the same row differently in another batch (other tile sizes, other summation orders), and a row next to a cell's
border would then change its cell because *another* row was replaced: one neighbouring step would move two counts, and a histogram's
guarantee would be off by a factor. So everything is integers held in float64, and no partial sum can reach 2^53:

    x_int = clamp(round(s (x - center)), -2^19, 2^19)                 s [C]: public powers of two
    z_int = x_int M_int + b_int                                       2^19 |column of M_int|_1 + |b_int| < 2^53
    z     = clamp(round(2^e z_int), -2^b, 2^b)                        the codes' lattice; the codes stay within 2^(b - 2)
    cell  = argmin_c |code_c|^2 - 2 z . code_c                        3 p 4^b < 2^53; ties to the lowest index

The first and the third line are elementwise; the second and the fourth are exact in any order of summation.
*Public range.* The first line clamps every coordinate of x - center to +-reach (rounded up to a power of two), a public constant, say a few
times the largest value over public rows: a row far outside is moved onto that box first, so it costs no more than any other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...errors import ConfigError
from ...privacy.lattice import exact_matmul, power_of_two, quantize
from ..inputs import check_context, row_chunks

INPUT_BITS = 19
_PRODUCT_BITS = 51


def check_public(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...]) -> torch.Tensor:
    """A public parameter as float64.

    Raises:
        ConfigError: wrong shape, NaN or Inf.
    """
    fits = tensor.ndim == len(shape) and all(
        s in (None, d) and d > 0 for s, d in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not bool(torch.isfinite(tensor).all()):
        wanted = ", ".join("?" if s is None else str(s) for s in shape)
        raise ConfigError(
            f"{name} must be a finite tensor [{wanted}], got {list(tensor.shape)} or NaN/Inf in it."
        )
    return tensor.detach().to(torch.float64)


def _ceil_log2(value: float) -> int:
    return math.ceil(math.log2(max(value, 1e-30)))


@dataclass(frozen=True, eq=False)
class ExactAffine:
    """x -> (x - center) matrix + bias on integers; the results are integers, in steps of 2^-exponent. All fields are public.

    center, scale [C]: the scale holds powers of two. matrix [C, p], bias [p]: integers in float64.
    """

    center: torch.Tensor
    scale: torch.Tensor
    matrix: torch.Tensor
    bias: torch.Tensor
    exponent: int

    @classmethod
    def from_tensors(
        cls,
        center: torch.Tensor,
        matrix: torch.Tensor,
        *,
        reach: float | torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> ExactAffine:
        """Rounds public float parameters to integers, once.

        Args:
            center [C], matrix [C, p], bias [p]. reach: public range of each coordinate of x - center, a number or [C].

        Raises:
            ConfigError: shapes do not fit, NaN or Inf, or a reach that is not positive.
        """
        matrix = check_public("matrix", matrix, (None, None))
        channels, width = matrix.shape
        center = check_public("center", center, (channels,))
        offset = matrix.new_zeros(width) if bias is None else check_public("bias", bias, (width,))
        span = check_public(
            "reach", torch.as_tensor(reach, dtype=torch.float64).expand(channels), (channels,)
        )
        if not bool((span > 0).all()):
            raise ConfigError("reach must be positive: the public range of each coordinate around center.")
        scale = power_of_two([INPUT_BITS - _ceil_log2(v) for v in span.tolist()], matrix.device)
        relative = matrix / scale[:, None]
        largest = 2.0**INPUT_BITS * relative.abs().sum(0) + offset.abs()
        exponent = _PRODUCT_BITS - _ceil_log2(float(largest.max()))
        unit = 2.0**exponent
        return cls(center, scale, torch.round(relative * unit), torch.round(offset * unit), exponent)

    @property
    def channels(self) -> int:
        return self.matrix.shape[0]

    @property
    def width(self) -> int:
        return self.matrix.shape[1]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] finite rows -> integer-valued float64 [n, p]."""
        device = rows.device
        integers = quantize(
            rows.to(torch.float64) - self.center.to(device), self.scale.to(device), 2**INPUT_BITS
        )
        bound = float((2.0**INPUT_BITS * self.matrix.abs().sum(0) + self.bias.abs()).max())
        return exact_matmul(integers, self.matrix.to(device), bound) + self.bias.to(device)


@dataclass(frozen=True, eq=False)
class RowQuantizer:
    """Nearest public code of a row, in a public projected space. All fields are public.

    projection: to p dimensions. codes [m, p]: integers in float64, in steps of 2^-exponent; |entries| <= 2^(bits - 2).
    """

    projection: ExactAffine
    codes: torch.Tensor
    exponent: int
    bits: int

    @classmethod
    def from_tensors(
        cls,
        center: torch.Tensor,
        projection: torch.Tensor,
        codes: torch.Tensor,
        *,
        reach: float | torch.Tensor,
    ) -> RowQuantizer:
        """Rounds public float parameters to integers, once.

        Args:
            center [C]. projection [C, p]. codes [m, p], in projected coordinates: (anchor - center) projection.
            reach: public range of each coordinate of x - center, a number or [C].

        Raises:
            ConfigError: shapes do not fit, NaN or Inf, or a reach that is not positive.
        """
        affine = ExactAffine.from_tensors(center, projection, reach=reach)
        codes = check_public("codes", codes, (None, affine.width))
        bits = (52 - _ceil_log2(3 * affine.width)) // 2
        exponent = bits - 2 - _ceil_log2(float(codes.abs().max()))
        return cls(affine, torch.round(codes * 2.0**exponent), exponent, bits)

    @property
    def size(self) -> int:
        """Number of cells m."""
        return self.codes.shape[0]

    def _integers(self, rows: torch.Tensor) -> torch.Tensor:
        shift = 2.0 ** (self.exponent - self.projection.exponent)
        return quantize(self.projection(rows), shift, 2**self.bits)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] -> float64 [n, p]: the rows in projected coordinates, exactly as `cells` sees them (on a lattice, and clamped).

        Raises:
            ConfigError, ContextError: see `check_context`.
        """
        n = check_context(rows, self.projection.channels, may_be_empty=True)
        out = rows.new_empty(n, self.projection.width, dtype=torch.float64)
        for part in row_chunks(n, max(self.projection.channels, self.projection.width)):
            out[part] = self._integers(rows[part]) * 2.0**-self.exponent
        return out

    def cells(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, C] -> int64 [n]: the nearest code of each row; private.

        *Formal guarantee.* A row's cell is a function of that row and of public parameters alone, whatever the other rows, their
        number and order (see the module's text).

        Raises:
            ConfigError, ContextError: see `check_context`.
        """
        n = check_context(rows, self.projection.channels, may_be_empty=True)
        codes = self.codes.to(rows.device)
        table = torch.cat([-2.0 * codes.mT, codes.square().sum(-1)[None]])  # one product: |c|^2 - 2 z.c
        bound = 3.0 * codes.shape[1] * 4.0**self.bits
        cells = torch.empty(n, dtype=torch.int64, device=rows.device)
        for part in row_chunks(n, max(self.size, self.projection.channels)):
            z = self._integers(rows[part])
            scores = exact_matmul(torch.cat([z, torch.ones_like(z[:, :1])], dim=-1), table, bound)
            cells[part] = scores.argmin(-1)  # the first of equals, as torch documents
        return cells
