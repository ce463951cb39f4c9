"""`RowsStructure` against a naive twin: loops over rows, weights outside the exponent."""

from __future__ import annotations

import math

import pytest
import torch

from hf_dp_xattn.errors import ConfigError, ReleaseError
from hf_dp_xattn.mechanisms.merge import merge
from hf_dp_xattn.mechanisms.rows_structure import ROWS_MULTIPLE, RowsStructure, stack_rows

SCALE = 0.4


def structure(rows: int = 5, batch: int = 1, heads: int = 2, seed: int = 0) -> RowsStructure:
    gen = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, batch, heads, rows, 6, generator=gen, dtype=torch.float64)
    return RowsStructure(
        key, value, torch.randn(batch, 1, 1, rows, generator=gen, dtype=torch.float64), SCALE
    )


def query(batch: int = 1, m: int = 3, heads: int = 2, seed: int = 9) -> torch.Tensor:
    return torch.randn(batch, heads, m, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(s: RowsStructure, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_r w_r e^(scale q.k_r) v_r / sum_r w_r e^(scale q.k_r), and the log of the denominator."""
    batch, heads, m, _ = q.shape
    out, lse = (
        torch.zeros(batch, heads, m, s.value.shape[-1], dtype=q.dtype),
        torch.zeros(batch, heads, m, dtype=q.dtype),
    )
    for b in range(batch):
        own = b if s.key.shape[0] > 1 else 0
        for h in range(heads):
            for i in range(m):
                total = 0.0
                for r in range(s.key.shape[2]):
                    weight = math.exp(float(s.bias[own, 0, 0, r])) * math.exp(
                        SCALE * float(q[b, h, i] @ s.key[own, h, r])
                    )
                    out[b, h, i] += weight * s.value[own, h, r]
                    total += weight
                out[b, h, i] /= total
                lse[b, h, i] = math.log(total)
    return out, lse


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_attend_and_partial(batch: int, rows: int) -> None:
    s, q = structure(rows, batch), query(2)
    out, lse = naive(s, q)
    assert torch.allclose(s.attend(q), out, atol=1e-9)
    partial = s.partial(q)
    assert torch.allclose(partial[0], out, atol=1e-9) and torch.allclose(partial[1], lse, atol=1e-9)


def test_a_weight_is_a_number_of_copies() -> None:
    s, q = structure(4), query()
    counts = torch.tensor([3, 1, 2, 5])
    weighted = RowsStructure(s.key, s.value, counts.double().log().view(1, 1, 1, -1), SCALE)
    copies = RowsStructure(
        s.key.repeat_interleave(counts, 2),
        s.value.repeat_interleave(counts, 2),
        torch.zeros(1, 1, 1, 11).double(),
        SCALE,
    )
    assert torch.allclose(weighted.attend(q), copies.attend(q), atol=1e-9)


def test_parts_merge_to_the_whole() -> None:
    s, q = structure(7), query()
    parts = [
        RowsStructure(s.key[:, :, p], s.value[:, :, p], s.bias[..., p], SCALE)
        for p in (slice(3), slice(3, None))
    ]
    merged = merge(*parts[0].partial(q), *parts[1].partial(q))
    assert torch.allclose(merged[0], s.attend(q), atol=1e-9) and torch.allclose(
        merged[1], s.partial(q)[1], atol=1e-9
    )


def test_stacking_pads_without_a_trace() -> None:
    parts = [structure(n, seed=n) for n in (5, 9, 1)]
    joined = stack_rows(parts)
    assert joined.key.shape[2] % ROWS_MULTIPLE == 0 and joined.key.shape[0] == 3
    q = query(3)
    for i, part in enumerate(parts):
        assert torch.allclose(joined.attend(q)[i], part.attend(q[i : i + 1])[0], atol=1e-9)
    chosen = joined.select(torch.tensor([2, 0, 2, 1]))
    q4 = q[[2, 0, 2, 1]]
    assert torch.allclose(chosen.attend(q4), joined.attend(q)[[2, 0, 2, 1]], atol=1e-12)
    assert torch.allclose(stack_rows(parts[:1]).attend(q[:1]), parts[0].attend(q[:1]), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    s, q = structure(9), query()
    out = stack_rows([s]).attend(q.to(dtype))
    assert out.dtype == dtype
    assert torch.allclose(
        out.double(), s.attend(q), atol={torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 5e-2)
    )


def test_queries_that_do_not_fit() -> None:
    s = structure(batch=2)
    for bad in (query(3), query(2, heads=3), query(2)[..., :4], query(2)[0]):
        for call in (s.attend, s.partial):
            with pytest.raises(ConfigError):
                call(bad)


def test_rows_of_unlike_layers_are_not_stacked() -> None:
    with pytest.raises(ReleaseError):
        stack_rows([structure(), structure(heads=3)])
