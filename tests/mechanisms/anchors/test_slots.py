"""The slot decoder against its naive twin."""

from __future__ import annotations

import pytest
import torch

from .naive_anchors import CHANNELS, CODE, SLOTS, gen, naive_slots, slot_decoder, slot_head


@pytest.mark.parametrize("batch", [1, 3], ids=lambda b: f"B={b}")
def test_matches_the_naive_twin(batch: int) -> None:
    decoder, head = slot_decoder(), slot_head()
    codes = torch.randn(batch, CODE, generator=gen(9))
    rows, weights = decoder.decode_batch(codes, head)
    assert rows.shape == (batch, SLOTS, CHANNELS)
    for i in range(batch):
        naive_rows, naive_weights = naive_slots(decoder, head, codes[i])
        torch.testing.assert_close(rows[i], naive_rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weights[i], naive_weights, rtol=1e-4, atol=1e-4)


def test_decode_is_one_element_of_the_batch() -> None:
    decoder, head = slot_decoder(), slot_head()
    code = torch.randn(CODE, generator=gen(9))
    context = decoder.decode(code.double(), head)
    rows, weights = decoder.decode_batch(code[None], head)
    assert context.rows.dtype == torch.float32
    torch.testing.assert_close(context.rows, rows[0])
    torch.testing.assert_close(context.log_weights, weights[0])
