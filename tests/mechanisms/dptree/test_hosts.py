"""dptree through `protect`: charged once, saved and loaded, batched; see tests/hosts for the invariants with mechanism='dptree'."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.mechanisms.dptree.tree_structure import DPTreeStructure

from ...hosts_tiny import picture, tiny_sd

CONFIG = dpx.DPXAttnConfig(unit="row", mechanism="dptree", degree=1, projection_dim=4, tree_bins=8)


@pytest.fixture
def protected() -> Any:
    pipe = tiny_sd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe, dpx.protect(pipe, CONFIG)


def test_one_release_serves_a_batch_and_is_charged_once(protected: Any) -> None:
    pipe, handle = protected
    release = handle.release(["a red circle", "green stars"])
    assert all(isinstance(s, DPTreeStructure) for c in release.contexts for s in c.structures)
    images = picture(pipe, **release.inputs(), num_images_per_prompt=2)
    assert images.shape[0] == 4 and bool(torch.isfinite(images).all())
    again = picture(pipe, **handle.release(["a red circle", "green stars"]).inputs(), num_images_per_prompt=2)
    assert torch.equal(images, again)
    report = handle.report().to_dict()
    assert [r["charges"] for r in report["releases"]] == [1, 1]
    assert all(7.9 < r["spent_epsilon"] <= 8.0 * (1 + 1e-9) for r in report["releases"])
    assert (
        "levels of trees" in str(handle.report())
        and "baseline" not in report["releases"][0]["guarantee_text"]
    )
    with pytest.raises(dpx.BudgetExceededError):
        handle.release("a red circle", fresh=True)


def test_save_and_load(protected: Any, tmp_path: Path) -> None:
    pipe, handle = protected
    release = handle.release("a red circle")
    expected = picture(pipe, **release.inputs())
    release.save_pretrained(tmp_path)
    other = tiny_sd()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dpx.Release.from_pretrained(tmp_path, host=other)
    assert type(loaded.contexts[0].structures[0]) is DPTreeStructure
    torch.testing.assert_close(picture(other, **loaded.inputs()), expected)
