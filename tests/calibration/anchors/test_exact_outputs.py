"""Outputs that are computed once and kept in half precision: the same losses as when rows are attended to again, and no file is left."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from hf_dp_xattn.calibration.anchors.exact_outputs import exact_outputs, worthwhile

from .synthetic_contexts import contexts, objective


def test_losses_are_those_of_the_rows() -> None:
    public, reads = contexts(40), objective()
    with exact_outputs(public, reads, seed=3) as (known, narrowed):
        index = torch.tensor([3, 17, 39, 0])
        rows = public.whole[index][:, :5].float()
        logs = torch.zeros(4, 5)
        found = []
        for batch, goal in ((public.part(index).float(), narrowed), (known.part(index).float(), narrowed)):
            found.append(
                goal.losses(
                    batch.whole,
                    rows,
                    logs,
                    queries=8,
                    layers=2,
                    generator=torch.Generator().manual_seed(0),
                    outputs=batch.outputs,
                )
            )
    torch.testing.assert_close(found[1], found[0], rtol=5e-3, atol=5e-3)
    kept = {layer.queries.shape for layer in narrowed.layers}
    assert kept == {layer.queries.shape for layer in reads.layers}  # 64: all of them fit


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with exact_outputs(contexts(10), objective(), seed=0):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_only_where_it_pays() -> None:
    public, reads = contexts(40), objective()
    assert worthwhile(public, reads, passes=100.0)
    assert not worthwhile(public, reads, passes=2.0)
    with exact_outputs(public, reads, seed=0) as (known, _):
        assert not worthwhile(known, reads, passes=100.0)
