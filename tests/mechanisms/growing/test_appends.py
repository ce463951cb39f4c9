"""Growing releases: units, horizon, bad input."""

from __future__ import annotations

import copy
import math
import os
import pickle

import pytest
import torch

from hf_dp_xattn import BudgetExceededError, ConfigError, ContextError, DPXAttnError
from hf_dp_xattn.mechanisms.anchors.anchors import prepare_anchors
from hf_dp_xattn.mechanisms.anchors.plan import Decoders
from hf_dp_xattn.mechanisms.growing_release import grow
from hf_dp_xattn.mechanisms.registry import prepare_release
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..anchors.naive_anchors import CHANNELS, decoders, plan
from .ways import (
    ANCHORS,
    KERNEL,
    SPECS,
    WAYS,
    batch,
    layer_rows,
    prepare,
)


@pytest.mark.parametrize("way", WAYS)
def test_groups_enter_once(way: str) -> None:
    growing = prepare(way, unit="group").open()
    growing.append(batch(way, 3, 0), groups=torch.tensor([4, 4, 9]))
    assert (growing.units, growing.next_group) == (2, 10)
    for again in ([9], [10, 4]):
        with pytest.raises(ContextError, match="span two appends"):
            growing.append(batch(way, len(again), 1), groups=torch.tensor(again))
    assert growing.appends == 1  # refused ones do not count
    growing.append(batch(way, 1, 1), groups=torch.tensor([10]))
    assert (growing.units, growing.rows, growing.appends) == (3, 4, 2)


@pytest.mark.parametrize("way", WAYS)
def test_the_horizon_is_the_end(way: str) -> None:
    growing = prepare(way, horizon=2).open()
    for i in range(2):
        growing.append(batch(way, 2, i))
    with pytest.raises(BudgetExceededError, match=r"all 2 appends.*open a new one"):
        growing.append(batch(way, 2, 3))
    closed = prepare(way).open()
    closed.close()
    with pytest.raises(BudgetExceededError, match="closed"):
        closed.append(batch(way, 2, 0))


@pytest.mark.parametrize("way", WAYS)
def test_bad_appends_release_nothing_and_may_be_made_again(way: str) -> None:
    growing = prepare(way, horizon=2).open()
    nan = batch(way, 2, 0)
    (nan if isinstance(nan, torch.Tensor) else nan.keys[1]).view(-1)[3] = math.nan
    other = layer_rows(2) if isinstance(nan, torch.Tensor) else torch.zeros(2, CHANNELS)
    empty = batch(way, 0, 0)
    for bad in (nan, other, empty):
        with pytest.raises((ContextError, ConfigError)):
            growing.append(bad)
    with pytest.raises(ConfigError, match="groups"):
        growing.append(batch(way, 2, 0), groups=torch.zeros(2, dtype=torch.int64))
    assert growing.appends == growing.rows == 0
    growing.append(batch(way, 2, 0))
    growing.append(batch(way, 2, 1))


@pytest.mark.parametrize("way", ["kernel_sum", "sum", "histogram"])
def test_an_empty_append_where_numbers_are_private(way: str) -> None:
    growing = prepare(way, neighboring="add_or_remove_one").open(SeededEntropy(0))
    growing.append(batch(way, 0, 0))
    state = growing.append(batch(way, 2, 0))
    assert state.guarantee.rows is None and state.guarantee.units is None
    assert "number of its rows" not in state.guarantee.clipping


@pytest.mark.parametrize("way", WAYS)
def test_other_failures_close_it(way: str) -> None:
    """After an error from within, the vector may have entered: nothing goes on."""
    prepared = prepare(way)
    growing = prepared.open()

    class Broken(SeededEntropy):
        def random_bytes(self, n: int) -> bytes:
            raise OSError("no entropy")

    broken = prepared.open(Broken(0))
    with pytest.raises(OSError):
        broken.append(batch(way, 2, 0))
    with pytest.raises(BudgetExceededError, match="closed"):
        broken.append(batch(way, 2, 0))
    growing.append(batch(way, 2, 0))


def test_what_cannot_grow_is_refused() -> None:
    for mechanism in ("dptree", "none"):
        with pytest.raises(ConfigError, match="release once"):
            grow(prepare_release(KERNEL.replace(mechanism=mechanism), SPECS), 8)
    for way in WAYS:
        with pytest.raises(ConfigError, match="enters once"):
            prepare(way, unit="context")
    for horizon in (0, -3, 10**6, 2.5, True):
        with pytest.raises(ConfigError, match="horizon"):
            prepare("kernel_sum", horizon=horizon)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="units"):
        grow(prepare_anchors(ANCHORS, [plan("sum")], decoders()), 8)
    with pytest.raises(ConfigError, match="replace_one"):
        prepare("sketch", neighboring="add_or_remove_one")
    with pytest.raises(ConfigError, match="no anchors"):
        bare = prepare_anchors(ANCHORS, [plan("histogram")], Decoders(None, None))
        grow(bare, 8).open().append(torch.zeros(2, CHANNELS))


def test_it_is_neither_pickled_nor_shown() -> None:
    growing = prepare("kernel_sum").open()
    growing.append(layer_rows(2))
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(DPXAttnError, match="private sums"):
            copied(growing)  # type: ignore[operator]
    assert repr(growing) == "GrowingRelease(appends=1 of 8, mechanism='kernel_sum')"
    g = growing.guarantee()
    assert g.is_private and (g.rows, g.units) == (2, 2)
    assert "at most 8 appends" in g.clipping and "once" in g.clipping and "public" in g.clipping


@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_go_on_in_another_process(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both would append at the price of one; the ledger knows of one stream."""
    growing = prepare(way).open()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(DPXAttnError, match="another process"):
        growing.check()
