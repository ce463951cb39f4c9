"""Long public prefixes: their exact attention is kept, and a sample of their rows."""

from __future__ import annotations

import pytest
import torch

from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings, SlotTrainer
from hf_dp_xattn.hosts.decoder_only import calibrate
from hf_dp_xattn.hosts.decoder_only.calibrate import SoftmaxProbe, _padded, _with_outputs


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, n, 8] of two heads: keys and values [B, 2, n, 2]."""
    key, value = rows.view(*rows.shape[:2], 2, 2, 2).permute(3, 0, 2, 1, 4)
    return key, value


def contexts_of(lengths: list[int]) -> PublicContexts:
    gen = torch.Generator().manual_seed(0)
    whole = [torch.randn(n, 8, generator=gen).half() for n in lengths]
    return _padded([w[:2] for w in whole], whole)


@pytest.mark.parametrize("lengths", [[5, 12], [12, 12, 3]], ids=str)
def test_outputs_are_the_exact_attention(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    monkeypatch.setattr(calibrate, "_SAMPLE", 4)
    contexts = contexts_of(lengths)
    queries = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(1))
    probe = SoftmaxProbe(split, 0.5, queries, torch.ones(2), None)
    long = _with_outputs(contexts, [probe])
    assert long.length == 12 and long.whole.shape == (len(lengths), 4, 8) and long.outputs is not None
    for i, n in enumerate(lengths):
        exact = probe.attend(contexts.whole[i : i + 1, :n].float(), queries)
        torch.testing.assert_close(long.outputs[0][i : i + 1].float(), exact, atol=2e-3, rtol=2e-3)
        assert all(any(torch.equal(r, w) for w in contexts.whole[i, :n]) for r in long.whole[i])
    assert long.part(torch.tensor([0])).float().length == 12
    trainer = SlotTrainer(long, 1, SlotSettings(code=4, slots=3, hidden=4, directions=2), torch.Generator())
    torch.testing.assert_close(trainer.log_weights.exp().sum(), torch.tensor(12.0))


def test_short_prefixes_stay_as_they_are() -> None:
    contexts = contexts_of([5, 7])
    assert _with_outputs(contexts, []) is contexts
