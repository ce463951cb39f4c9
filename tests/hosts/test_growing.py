"""`protected.release(context, horizon=...)` and `release.append(more)`: one charge, units once, nothing private at rest, fail closed."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import (
    BudgetExceededError,
    ConfigError,
    ContextError,
    DPXAttnError,
    ProtectionLostError,
    ReleaseError,
)
from hf_dp_xattn.privacy.bits import SeededEntropy

from ..hosts_tiny import CHANNELS, picture, tiny_sd
from ..hub.hosts import files
from ..private_content import PrivateContent, check_clean
from .anchor_calibrations import BOTH, CONFIG, RELEASES, calibration_for, protect

FIRST, MORE, SECRET = "a red circle", "a blue square", "zebra quartz"


def check_without(blobs: dict[str, bytes], prompt: str) -> None:
    """Neither the prompt, nor its token ids, nor its private rows, keys and values; not even one number of them as it would be printed."""
    pipe: Any = tiny_sd()
    ids = torch.tensor(pipe.tokenizer(prompt, truncation=True, max_length=16).input_ids)
    with torch.no_grad():
        rows = pipe.encode_prompt(prompt, "cpu", 1, False)[0][0, 1:]
        attn = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        private = PrivateContent((prompt,), (ids,), (rows, attn.to_k(rows), attn.to_v(rows)))
    check_clean(blobs, private)
    printed = [f"{float(part[0, 0]):.4f}".encode() for part in private.rows]
    assert not any(number in blob for number in printed for blob in blobs.values())


def embeddings(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, CHANNELS, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("kind", ["text", "ids", "embeddings"])
def test_each_content_is_charged_once_for_the_whole_horizon(
    pipe: Any, private: dpx.DPXAttnConfig, kind: str
) -> None:
    ledger = dpx.Ledger()
    handle = protect(pipe, private, ledger=ledger)
    contents: list[Any] = [FIRST, MORE, SECRET]
    if kind == "ids":
        contents = [
            pipe.tokenizer(t, truncation=True, max_length=16, return_tensors="pt").input_ids for t in contents
        ]
    if kind == "embeddings":
        contents = [embeddings(n, n) for n in (16, 5, 2)]
    release = handle.release(contents[0], horizon=3)
    before = release.contexts[0]
    pictures = [picture(pipe, **release.inputs())]
    for more in contents[1:]:
        assert release.append(more) is release
        pictures.append(picture(pipe, **release.inputs()))
    names = {"text": 5, "ids": 3, "embeddings": 3}[
        kind
    ]  # ids padded, not padded, without special tokens; a text's own, and folded; embeddings as half precision reads them
    assert [c.note for c in ledger.entries()] == names * 3 * [{"horizon": 3}]
    assert len({c.digest for c in ledger.entries()}) == names * 3  # each content, once
    for content in contents:
        with pytest.raises(BudgetExceededError):
            handle.release(content, fresh=True)
    assert all(bool(torch.isfinite(p).all()) for p in pictures)
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in itertools.pairwise(pictures))
    rows = {"text": 3 * 15, "ids": 3 * 15, "embeddings": 23}[kind]
    assert release.guarantees[0].rows == rows and release.contexts[0].rows == before.rows == 16
    with pytest.raises(BudgetExceededError, match="all 3 appends"):
        release.append(embeddings(3, 9))
    assert picture(pipe, **release.inputs()).equal(pictures[-1])
    report = handle.report()
    assert [r["charges"] for r in report.releases] == [1]
    assert "at most 3 appends" in str(report) and "public" in str(report)


@pytest.mark.parametrize("release_kind", RELEASES)
def test_every_kind_of_anchors_grows(pipe: Any, release_kind: str) -> None:
    handle = dpx.protect(pipe, CONFIG, calibration=calibration_for(pipe, release_kind))
    release = handle.release(FIRST, horizon=4).append(MORE)
    assert release.guarantees[0].rows == 30
    assert bool(torch.isfinite(picture(pipe, **release.inputs())).all())


def test_the_state_is_attention_over_everything_that_came(pipe: Any) -> None:
    """With hardly any noise, rows appended in two parts draw what they draw when released at once."""
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=1e7, degree=2, projection_dim=4)
    handle = protect(
        pipe, config, budget=dpx.Budget(1e8, 1e-5, "row", "replace_one"), allow_large_epsilon=True
    )
    first, more = embeddings(16), embeddings(6, 1)
    release = handle.release(first, horizon=2)
    alone = picture(pipe, **release.inputs())
    both = picture(pipe, **release.append(more).inputs())
    whole = handle.release(torch.cat([first, more]))
    object.__setattr__(
        whole.contexts[0], "rows", 16
    )  # the length of the placeholder, beside the negative prompt
    at_once = picture(pipe, **whole.inputs())
    assert float((both - at_once).abs().max()) < 1e-2 * float((alone - at_once).abs().max())


def test_placeholders_that_are_out_keep_serving_their_state(pipe: Any) -> None:
    handle = protect(pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=4))
    release = handle.release(FIRST, horizon=2)
    old = release.inputs()
    before = picture(pipe, **old)
    release.append(MORE)
    after = picture(pipe, **release.inputs())
    assert picture(pipe, **old).equal(before) and not after.equal(before)


@BOTH
def test_nothing_but_the_noised_sum(private: dpx.DPXAttnConfig) -> None:
    """With the released state held fixed, another private content draws the same picture, bit for bit."""
    states, drawn = [], []
    for second in (MORE, SECRET):
        pipe = tiny_sd()
        release = protect(pipe, private, entropy=SeededEntropy(5)).release(FIRST, horizon=2).append(second)
        states.append(release.contexts[0])
        release._growing.latest = states[0]
        drawn.append(picture(pipe, **release.inputs()))
    assert drawn[0].equal(drawn[1])


@BOTH
def test_content_enters_once(pipe: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(pipe, private)
    release = handle.release(FIRST, horizon=5)
    release.append(MORE)
    for again in (FIRST, MORE):
        with pytest.raises(ContextError, match="enters once"):
            release.append(again)
    assert release.guarantees[0].rows == 30
    handle.release(SECRET)  # spends this content's whole budget elsewhere
    with pytest.raises(BudgetExceededError):
        release.append(SECRET)
    with pytest.raises(BudgetExceededError):
        handle.release(SECRET, horizon=5)
    with pytest.raises(BudgetExceededError):
        handle.release(FIRST, horizon=5)  # the opening is charged to its first content
    assert release.guarantees[0].rows == 30


def test_groups_and_phrases(pipe: Any) -> None:
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", degree=1, projection_dim=4)
    handle = protect(pipe, config)
    release = handle.release(embeddings(16), groups=torch.arange(16) // 4, horizon=4)
    with pytest.raises(ContextError, match="span two appends"):
        release.append(embeddings(2, 1), groups=torch.tensor([3, 4]))
    with pytest.raises(ConfigError, match="groups"):
        release.append(embeddings(2, 1))
    release.append(embeddings(2, 1), groups=torch.tensor([4, 5]))
    assert release.guarantees[0].units == 6
    phrases = handle.release(["a red circle", "a tree"], groups="phrases", horizon=4)
    phrases.append("a blue square, a house and a dog", groups="phrases")
    assert (phrases.guarantees[0].units, phrases.guarantees[0].rows) == (5, 75)


@BOTH
def test_loaded_releases_do_not_grow(pipe: Any, private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    handle = protect(pipe, private)
    release = handle.release(FIRST, horizon=4).append(SECRET)
    expected = picture(pipe, **release.inputs())
    release.save_pretrained(tmp_path / "release")
    check_without(files(tmp_path), SECRET)
    with pytest.raises(DPXAttnError):
        pickle.dumps(release)
    other = tiny_sd()
    loaded = dpx.Release.from_pretrained(tmp_path / "release", host=other)
    assert picture(other, **loaded.inputs()).equal(expected)
    with pytest.raises(ReleaseError, match=r"loaded.*horizon"):
        loaded.append(MORE)
    release.append(MORE)  # the one in memory goes on: every state is covered by the charge
    with pytest.raises(ReleaseError, match="without a horizon"):
        handle.release("a dog").append(MORE)


def test_private_sums_are_not_shown_or_copied(pipe: Any) -> None:
    handle = protect(pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=4))
    release = handle.release(SECRET, horizon=4)
    growing = release._growing
    assert repr(growing) == "GrowingContext(GrowingRelease(appends=1 of 4, mechanism='kernel_sum'))"
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(DPXAttnError):
            copied(growing)  # type: ignore[operator]
    shown = {"release": repr(release).encode(), "report": str(handle.report()).encode()}
    check_without(shown, SECRET)


def test_what_cannot_grow_is_refused_before_the_charge(pipe: Any) -> None:
    for config, message in (
        (
            dpx.DPXAttnConfig(unit="row", mechanism="dptree", degree=1, projection_dim=4, tree_bins=1),
            "release once",
        ),
        (dpx.DPXAttnConfig(unit="row", mechanism="none"), "release once"),
        (
            dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context", degree=1, projection_dim=4),
            "enters once",
        ),
    ):
        ledger = dpx.Ledger()
        with protect(pipe, config, ledger=ledger) as handle, pytest.raises(ConfigError, match=message):
            handle.release(FIRST, horizon=4)
        assert ledger.entries() == ()
    with protect(
        pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=4)
    ) as handle:
        for context, horizon in (([FIRST, MORE], 4), (FIRST, 0), (FIRST, 10**6), ("", True)):
            with pytest.raises(ConfigError):
                handle.release(context, horizon=horizon)
        assert handle.ledger.entries() == ()
        release = handle.release(FIRST, horizon=4)
        for bad in ([MORE, SECRET], 3, torch.zeros(2, CHANNELS + 1), torch.full((2, CHANNELS), torch.nan)):
            with pytest.raises((ConfigError, ContextError)):
                release.append(bad)  # type: ignore[arg-type]
        assert release.append(MORE).guarantees[0].rows == 30


def test_fail_closed(pipe: Any) -> None:
    handle = protect(pipe, dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=4))
    release = handle.release(FIRST, horizon=4)
    attn = next(iter(handle.layers.values())).module
    with torch.no_grad():
        attn.to_k.weight.add_(0.1)
    with pytest.raises(ReleaseError, match="does not fit"):
        release.append(MORE)  # its rows would be projected by other weights
    with torch.no_grad():
        attn.to_k.weight.sub_(0.1)
    kept = attn.processor
    attn.set_processor(handle.host.originals[next(iter(handle.layers))])
    with pytest.raises(ProtectionLostError):
        release.append(MORE)
    attn.set_processor(kept)
    handle.unprotect()
    with pytest.raises(ReleaseError, match="no longer protected"):
        release.append(MORE)
