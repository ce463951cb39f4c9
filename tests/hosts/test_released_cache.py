"""What was released is found again, however much was released since; in memory that does not grow with it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn import ReleaseError
from hf_dp_xattn.hosts import released_cache
from hf_dp_xattn.privacy.noise import SeededEntropy

from ..hosts_tiny import tiny_sd
from .anchor_calibrations import protect
from .transformers.decoder_only.tiny import tiny as decoder_tiny

BOTH = pytest.mark.parametrize("private", ["kernel_sum", "dptree", "anchors"], indirect=True)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four releases stay in memory; the folder in which others are set aside."""
    monkeypatch.setattr(released_cache, "MOST", 4)
    monkeypatch.setattr(released_cache.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def tensors(release: Any) -> list[torch.Tensor]:
    [context] = release.contexts
    found = [context.public_rows, *(t for s in context.structures for t in s.tensors().values())]
    return found if context.context is None else [*found, context.context.rows, context.context.log_weights]


@pytest.mark.slow
def test_after_257_prompts_the_first_is_found(private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny_sd(), private)
    first = handle.release("0 cats")
    before = [t.clone() for t in tensors(first)]
    del first
    for i in range(1, 258):
        handle.release(f"{i} cats")
    assert len(handle.releases.cache._latest) == released_cache.MOST
    again = handle.release("0 cats")
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), before, strict=True))
    assert len(handle.report().releases) == 258


@BOTH
def test_what_was_set_aside_is_what_was_released(private: dpx.DPXAttnConfig, few: Path) -> None:
    pipe = tiny_sd()
    handle = protect(pipe, private)
    releases = [handle.release(f"{i} cats") for i in range(9)]
    charged = handle.ledger.entries()
    [folder] = few.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and len(list(folder.iterdir())) == 5
    for i in (0, 8, 3, 0, 1, 2, 4):
        again = handle.release(f"{i} cats")
        assert again.guarantees == releases[i].guarantees
        assert [type(s) for s in again.contexts[0].structures] == [
            type(s) for s in releases[i].contexts[0].structures
        ]
        assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(releases[i]), strict=True))
        out = pipe(**again.inputs(), num_inference_steps=1, output_type="latent").images
        assert bool(out.isfinite().all())
    batch = handle.release([f"{i} cats" for i in range(9)])  # more than stay in memory
    assert len(batch) == 9 and handle.ledger.entries() == charged
    assert len(handle.releases.cache._latest) == 4
    new = handle.releases.cache
    assert len(new) == 9
    handle.unprotect()
    assert list(few.iterdir()) == [] and len(new) == 0


def test_a_prefix(few: Path, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(decoder_tiny("llama"), private)
    first = handle.release(torch.arange(4, 9))
    for i in range(5):
        handle.release(torch.arange(5 + i, 12 + i))
    again = handle.release(torch.arange(4, 9))
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(first), strict=True))
    assert again.inputs(input_ids=torch.tensor([[5, 6]]))


@pytest.mark.parametrize("kind", ["none", "seeded"])
def test_what_is_never_written(kind: str, private: dpx.DPXAttnConfig, few: Path) -> None:
    config = private.replace(mechanism="none") if kind == "none" else private
    entropy = SeededEntropy(0) if kind == "seeded" else None
    handle = dpx.protect(tiny_sd(), config, entropy=entropy)
    for i in (*range(9), 0):
        handle.release(f"{i} cats")
    assert list(few.iterdir()) == []
    assert len(handle.releases.cache) == (4 if kind == "none" else 9)


def test_a_folder_that_cannot_be_written(
    private: dpx.DPXAttnConfig, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = dpx.protect(tiny_sd(), private)
    monkeypatch.setattr(released_cache.tempfile, "tempdir", str(few / "nowhere"))
    with pytest.warns(UserWarning, match="stay in memory"):
        for i in range(6):
            handle.release(f"{i} cats")
    handle.release("0 cats")


def test_a_folder_that_was_emptied(private: dpx.DPXAttnConfig, few: Path) -> None:
    handle = dpx.protect(tiny_sd(), private)
    for i in range(6):
        handle.release(f"{i} cats")
    for file in few.glob("*/*"):
        file.unlink()
    before = handle.ledger.entries()
    with pytest.raises(ReleaseError, match="Nothing was spent"):
        handle.release("0 cats")
    assert handle.ledger.entries() == before


def test_it_goes_with_the_handle_and_not_with_a_fork(private: dpx.DPXAttnConfig, few: Path) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    for i in range(6):
        handle.release(f"{i} cats")
    child = os.fork()
    if child == 0:
        try:
            handle.releases.cache.clear()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert len(list(few.glob("*/*"))) == 2
    handle.release("0 cats")
