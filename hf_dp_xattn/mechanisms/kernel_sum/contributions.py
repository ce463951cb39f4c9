r"""From private rows to exact integer sums of clipped contributions.

One layer's contribution of a row is, head by head, the outer product of w phi(k') [r] with u = value_scale [v - c; beta] [dv + 1].
Both factors are rounded to integers (elementwise), so products and sums over rows are exact in float64/int64:

    phi_int = round(2^f_h w phi),  u_int = round(2^g_h u),  f_h + g_h = F for every head of every layer,

hence all coordinates of the joint release live on one lattice of step 2^-F, and the clipping bound is an integer there. Entries are
clamped to 19 bits: those of phi at its public norm bound, those of u at about 16 C / |phi|, which only a row that is clipped at least
16-fold can reach (clamping is one more function of the row alone).
Three sums, one meaning: `sum_rows` (fast: clip on the factors, one exact GEMM), `sum_units` (groups: materialised, any unit),
`sum_sketch` (public linear sketch of each unit's contribution).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ...errors import ConfigError, ContextError
from ...privacy.clipping import MAX_COORDINATES, clip_factor, verify_clipped
from ...privacy.lattice import (
    ENTRY_BITS,
    EXACT_LIMIT,
    ROWS_PER_CHUNK,
    exact_exp,
    exact_matmul,
    exact_square_sum,
    power_of_two,
    quantize,
    sequential_sum,
)
from ..inputs import MAX_ROWS, check_groups
from .features import FeatureMap
from .geometry import MAX_LOG_WEIGHT, HeadGeometry, feature_norm

AT_ONCE = 2**22  # numbers of the rows' factors that are computed together: they stay in a cache


@dataclass(frozen=True)
class LayerEncoder:
    """Turns one layer's rows into integer factors on the lattice 2^-F."""

    geometry: HeadGeometry
    features: FeatureMap
    exponent: int
    _phi_exponents: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        widest = max(self.geometry.key_dim, self.geometry.key_map.shape[-2])
        if widest * 2.0**42 >= EXACT_LIMIT:
            raise ConfigError(
                f"Heads of {widest} channels are too wide for exact sums in float64 (at most 2047): use mechanism='anchors' or 'library'."
            )
        norms = feature_norm(self.features, self.geometry)
        object.__setattr__(
            self, "_phi_exponents", [ENTRY_BITS - math.ceil(math.log2(float(v))) for v in norms]
        )

    @property
    def size(self) -> int:
        """Coordinates of this layer's part of the release."""
        return self.geometry.heads * self.features.size * (self.geometry.value_dim + 1)

    def projected_keys(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, n, d] -> (clipped k' [H, n, p], row weight w [H, n, 1]); float64, row by row."""
        g, device = self.geometry, key.device
        range_exponent = [20 - math.ceil(math.log2(float(r))) for r in g.key_range]
        scale = power_of_two(range_exponent, device)[:, None, None]
        centred = quantize(key.to(torch.float64) - g.key_center.to(device)[:, None], scale, 2**20)
        # the maps' largest entry gets 22 bits; |partial sums| <= d 2^20 2^22
        largest = g.key_map.abs().amax((-1, -2)).clamp_min(1e-30)
        map_scale = power_of_two([21 - math.ceil(math.log2(float(v))) for v in largest], device)[
            :, None, None
        ]
        mapped = exact_matmul(
            centred, quantize(g.key_map.to(device), map_scale, 2**22).mT, g.key_dim * 2.0**42
        )
        mapped = mapped / (scale * map_scale)
        radius = g.key_radius.to(device)[:, None, None]
        # clip |k'| to the radius: integers, so that the sum of squares is exact in any order
        units = quantize(mapped, 2.0**18 / radius, 2**21)
        norm = exact_matmul(
            units.square(), units.new_ones(units.shape[-1], 1), units.shape[-1] * 2.0**42
        ).sqrt()
        clipped = units * torch.clamp(2.0**18 / norm.clamp_min(1.0), max=1.0) * (radius * 2.0**-18)
        if not bool(g.weight_map.any()):
            return clipped, torch.ones_like(clipped[..., :1])
        weight_scale = power_of_two(
            [21 - math.ceil(math.log2(float(v.abs().max().clamp_min(1e-30)))) for v in g.weight_map], device
        )
        weights = quantize(g.weight_map.to(device), weight_scale[:, None], 2**22).unsqueeze(-1)
        logs = exact_matmul(centred, weights, g.key_dim * 2.0**42) / (scale * weight_scale[:, None, None])
        return clipped, exact_exp(logs, MAX_LOG_WEIGHT)

    def factors(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """([H, n, r], [H, n, dv + 1]) integer-valued float64 factors of each row's contribution."""
        g, device = self.geometry, key.device
        clipped, weight = self.projected_keys(key)
        phi = self.features.key_features(clipped).mul_(weight)
        phi_scale = power_of_two(self._phi_exponents, device)[:, None, None]
        value_scale = power_of_two([self.exponent - e for e in self._phi_exponents], device)[:, None, None]
        centred = value.to(torch.float64) - g.value_center.to(device)[:, None]
        constant = g.normalizer_weight.to(device)[:, None, None].expand(-1, centred.shape[1], 1)
        scaled = torch.cat([centred, constant], dim=-1) * g.value_scale.to(device)[:, None, None]
        return quantize(phi, phi_scale), quantize(scaled, value_scale)


def make_encoders(
    geometries: Sequence[HeadGeometry], features: Sequence[FeatureMap], exponent: int
) -> tuple[LayerEncoder, ...]:
    """One for each layer. Raises ConfigError where what is public of them makes a release impossible."""
    encoders = tuple(LayerEncoder(g, f, exponent) for g, f in zip(geometries, features, strict=True))
    if sum(e.size for e in encoders) > MAX_COORDINATES:
        raise ConfigError(
            "The release would have more than 2^28 coordinates; lower degree or projection_dim."
        )
    return encoders


def check_rows(
    keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], encoders: Sequence[LayerEncoder]
) -> int:
    """The public number of rows; raises before anything is computed.

    Raises:
        ConfigError: shapes do not fit the layers. ContextError: no rows, too many rows, NaN or Inf.
    """
    if len(keys) != len(encoders) or len(values) != len(encoders) or not encoders:
        raise ConfigError(
            f"Expected keys and values of {len(encoders)} layers, got {len(keys)} and {len(values)}."
        )
    n = keys[0].shape[-2]
    for key, value, encoder in zip(keys, values, encoders, strict=True):
        encoder.geometry.check(key, value)
        if key.shape[-2] != n or value.shape[-2] != n:
            raise ContextError("All layers' keys and values must have the same number of rows.")
    if n == 0:
        raise ContextError("The context has no rows (n = 0): there is nothing to release.")
    if n > MAX_ROWS:
        raise ContextError(f"The context has too many rows: at most {MAX_ROWS} can be summed exactly.")
    for tensor in (*keys, *values):
        if not bool(torch.isfinite(tensor).all()):
            raise ContextError("The context's keys or values hold NaN or Inf; nothing was released.")
    return n


def _chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def _rows_per_chunk(encoders: Sequence[LayerEncoder], per_row: int, chunk_size: int | None) -> int:
    if chunk_size is not None:
        return max(1, min(chunk_size, ROWS_PER_CHUNK))
    return max(1, min(ROWS_PER_CHUNK, AT_ONCE // max(1, per_row)))


def _square_sum(x: torch.Tensor) -> torch.Tensor:
    """[H, n, c] integers -> [H, n] sums of squares: exact in blocks of 2^14 columns, the blocks added in order."""
    total = x.new_zeros(x.shape[:-1])
    for block in x.split(ROWS_PER_CHUNK, dim=-1):
        total = total + exact_square_sum(block, block.shape[-1] * 4.0**ENTRY_BITS)
    return total


def _row_norm_squared(phi: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[n] sum over heads of |phi|^2 |u|^2, added in the order of the heads."""
    return sequential_sum((_square_sum(phi) * _square_sum(value)).mT)


def sum_rows(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    bound: int,
    *,
    chunk_size: int | None = None,
) -> list[torch.Tensor]:
    """Sum over rows of clipped contributions, unit = row; int64 [H, r, dv + 1] per layer.

    The clip factor acts on phi_int alone: a(row) = trunc(t phi_int) (x) u_int, and
    |a|^2 = sum_h |trunc(t phi)|^2 |u|^2 <= t^2 |c|^2 (privacy/clipping.py). Bit-identical in any order and chunking.
    """
    n = check_rows(keys, values, encoders)
    totals = [
        torch.zeros(
            e.geometry.heads, e.features.size, e.geometry.value_dim + 1, dtype=torch.int64, device=k.device
        )
        for e, k in zip(encoders, keys, strict=True)
    ]
    per_row = sum(e.geometry.heads * (e.features.size + e.geometry.value_dim + 1) for e in encoders)
    for rows in _chunks(n, _rows_per_chunk(encoders, per_row, chunk_size)):
        factors = [e.factors(k[:, rows], v[:, rows]) for e, k, v in zip(encoders, keys, values, strict=True)]
        factor = clip_factor(joint_norm_squared(factors), bound)[None, :, None]
        # as integers of 32 bits and back: `trunc`, several times faster
        clipped = [(phi.mul_(factor).to(torch.int32).to(torch.float64), value) for phi, value in factors]
        verify_clipped(joint_norm_squared(clipped), bound)
        for total, (phi, value) in zip(totals, clipped, strict=True):
            # the narrow factor on the left: twice as fast, and the same integers
            product = exact_matmul(value.mT, phi, phi.shape[1] * 4.0**ENTRY_BITS)
            total += product.mT.to(torch.int64)
    return totals


def joint_norm_squared(factors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """[n] |c(row)|^2 over all layers and heads, in lattice units."""
    return sequential_sum(torch.stack([_row_norm_squared(phi, value) for phi, value in factors], dim=-1))


def unit_rows(unit: str, n: int, groups: torch.Tensor | None) -> list[torch.Tensor]:
    """Row indices of each unit; the grouping is public.

    Raises:
        ConfigError: see `check_groups`.
    """
    check_groups(unit, n, groups)
    if groups is not None:
        order = torch.argsort(groups.cpu(), stable=True)
        _, counts = torch.unique(groups.cpu(), return_counts=True)
        return list(torch.split(order, counts.tolist()))
    return [torch.arange(n)] if unit == "context" else list(torch.arange(n).split(1))


def unit_contribution(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    rows: torch.Tensor,
) -> list[torch.Tensor]:
    """One unit's exact contribution: integer-valued float64 [H, r, dv + 1] per layer (sum over its rows)."""
    result = []
    for encoder, key, value in zip(encoders, keys, values, strict=True):
        g = encoder.geometry
        total = key.new_zeros(g.heads, encoder.features.size, g.value_dim + 1, dtype=torch.int64)
        for part in rows.to(key.device).split(ROWS_PER_CHUNK // 2):
            phi, u = encoder.factors(key[:, part], value[:, part])
            total += exact_matmul(phi.mT, u, part.shape[0] * 4.0**ENTRY_BITS).to(torch.int64)
        result.append(total.to(torch.float64))  # above 2^53 (huge units) rounded elementwise, still integers
    return result


def sum_units(
    encoders: Sequence[LayerEncoder],
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    bound: int,
    units: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Sum over units of clipped contributions (any unit, materialised): int64 [H, r, dv + 1] per layer."""
    check_rows(keys, values, encoders)
    totals: list[torch.Tensor] | None = None
    for rows in units:
        parts = unit_contribution(encoders, keys, values, rows)
        factor = clip_factor(_norm_squared(parts), bound)
        clipped = [torch.trunc(part * factor) for part in parts]
        verify_clipped(_norm_squared(clipped), bound)
        integers = [part.to(torch.int64) for part in clipped]
        totals = integers if totals is None else [t + i for t, i in zip(totals, integers, strict=True)]
    assert totals is not None
    return totals


def _norm_squared(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return sequential_sum(torch.stack([part.square().sum() for part in parts]))
