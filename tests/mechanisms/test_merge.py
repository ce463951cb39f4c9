from __future__ import annotations

import pytest
import torch

from hf_dp_xattn.mechanisms.merge import exact_partial, merge


def rows(n: int, seed: int, heads: int = 2, d: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, n, d, generator=gen), torch.randn(2, heads, n, 3, generator=gen)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (40, 1)], ids="n{0[0]}+{0[1]}".format)
@pytest.mark.parametrize("size_of_logits", [1.0, 30.0])
def test_merging_two_parts_is_attention_over_all(sizes: tuple[int, int], size_of_logits: float) -> None:
    query = size_of_logits * torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(9))
    (ka, va), (kb, vb) = rows(sizes[0], 0), rows(sizes[1], 1)
    out, lse = merge(*exact_partial(query, ka, va, 0.7), *exact_partial(query, kb, vb, 0.7))
    logits = 0.7 * query @ torch.cat([ka, kb], 2).mT
    torch.testing.assert_close(out, torch.softmax(logits, -1) @ torch.cat([va, vb], 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, torch.logsumexp(logits, -1))


def test_adding_outputs_without_their_weights_would_be_noticed() -> None:
    query = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(9))
    (ka, va), (kb, vb) = rows(30, 0), rows(2, 1)
    a, b = exact_partial(query, ka, va, 1.0), exact_partial(query, kb, vb, 1.0)
    assert not torch.allclose(merge(*a, *b)[0], (a[0] + b[0]) / 2, atol=1e-2)


def test_hidden_rows_count_for_nothing() -> None:
    query = torch.randn(2, 2, 6, 5)
    key, value = rows(4, 0)
    bias = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf]).expand(2, 1, 1, 4)
    out, lse = exact_partial(query, key, value, 1.0, bias)
    torch.testing.assert_close(out, exact_partial(query, key[:, :, ::2], value[:, :, ::2], 1.0)[0])
    none, empty = exact_partial(query, key, value, 1.0, torch.full((2, 1, 1, 4), -torch.inf))
    assert bool((none == 0).all()) and bool((empty == -torch.inf).all())
    torch.testing.assert_close(merge(out, lse, none, empty)[0], out)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_computes_in_float32_or_wider(dtype: torch.dtype) -> None:
    key, value = (t.to(dtype) for t in rows(4, 0))
    out, lse = exact_partial(key, key, value, 1.0)
    assert out.dtype == lse.dtype == torch.promote_types(dtype, torch.float32)
