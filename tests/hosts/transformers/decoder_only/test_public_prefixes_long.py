"""Long public prefixes: their exact attention is kept, and a sample of their rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors import anchors_kind
from hf_dp_xattn.calibration.anchors.slots_fit import PublicContexts, SlotSettings, SlotTrainer
from hf_dp_xattn.calibration.public_data import PublicData
from hf_dp_xattn.hosts import calibrate
from hf_dp_xattn.hosts.transformers.decoder_only import public_prefixes
from hf_dp_xattn.hosts.transformers.decoder_only.public_prefixes import SoftmaxProbe, exact_outputs

from .tiny import segments, tiny


def split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [B, n, 8] of two heads: keys and values [B, 2, n, 2]."""
    key, value = rows.view(*rows.shape[:2], 2, 2, 2).permute(3, 0, 2, 1, 4)
    return key, value


@pytest.mark.parametrize("lengths", [[5, 12], [12, 12, 3]], ids=str)
def test_outputs_are_the_exact_attention_whatever_the_lengths(lengths: list[int]) -> None:
    gen = torch.Generator().manual_seed(0)
    rows = [torch.randn(n, 8, generator=gen).half() for n in lengths]
    probe = SoftmaxProbe(split, 0.5, torch.randn(2, 6, 2, generator=gen), torch.ones(2), None)
    for found, own in zip(exact_outputs(rows, probe, batch=2), rows, strict=True):
        exact = probe.attend(own.float().unsqueeze(0), probe.queries)[0]
        torch.testing.assert_close(found.float(), exact, atol=2e-3, rtol=2e-3)


def gathered(monkeypatch: pytest.MonkeyPatch, lengths: list[int], sample: int) -> PublicContexts:
    """What a calibration is fitted to, for prefixes of as many one-token segments."""
    seen: list[PublicContexts] = []

    def stop(config: object, data: PublicData, settings: object) -> SimpleNamespace:
        assert data.contexts is not None
        seen.append(data.contexts)
        return SimpleNamespace(verify=lambda: None)

    monkeypatch.setattr(anchors_kind, "fit_anchors", stop)
    monkeypatch.setattr(calibrate, "check_contexts", lambda *few: None)
    monkeypatch.setattr(public_prefixes, "_SAMPLE", sample)
    monkeypatch.setattr(public_prefixes, "GATHER_BATCH", 2)
    dpx.calibrate(
        tiny("llama"),
        [segments([1] * n, i) for i, n in enumerate(lengths)],
        dpx.DPXAttnConfig(mechanism="anchors", unit="group"),
        epsilons=(8.0,),
        releases=("sum",),
        public_head=[1, 4],
        query_prompts=1,
        query_steps=2,
        progress=False,
    )
    return seen[0]


def test_of_long_prefixes_the_outputs_and_a_sample_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [9, 3, 7]
    short = gathered(monkeypatch, lengths, sample=64)
    assert short.outputs is None and short.length is None
    long = gathered(monkeypatch, lengths, sample=6)
    assert torch.equal(short.units, long.units) and torch.equal(short.mask, long.mask)
    assert short.mask.sum(1).tolist() == lengths
    assert long.length == short.whole.shape[1] and long.whole.shape[1] == 6 and long.outputs is not None
    assert {len(o) for o in long.outputs} == {3}
    for rows, all_rows in zip(long.whole, short.whole, strict=True):
        assert all(any(torch.equal(r, w) for w in all_rows) for r in rows)
    assert long.part(torch.tensor([0])).float().length == long.length
    trainer = SlotTrainer(long, 1, SlotSettings(code=4, slots=3, hidden=4, directions=2), torch.Generator())
    torch.testing.assert_close(trainer.log_weights.exp().sum(), torch.tensor(float(long.length)))
