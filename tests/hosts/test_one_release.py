"""Invariant 2: one release per context, shared by steps, guidance, images and calls; a second one is charged and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts import releases as releases_module

from ..hosts_tiny import CHANNELS, latents, picture, tiny_sd
from .anchor_calibrations import BOTH, protect


class Runs:
    """Counts releases, text encoder calls and charges."""

    def __init__(self, handle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[str] = []
        run, charge = releases_module.Releases.run, handle.ledger.charge_all
        monkeypatch.setattr(releases_module.Releases, "run", lambda *a: self.order.append("run") or run(*a))
        monkeypatch.setattr(
            handle.ledger, "charge_all", lambda *a, **k: self.order.append("charge") or charge(*a, **k)
        )
        if handle.host._patches:
            text = handle.host._patches[0].text
            encode = text.encode
            text.encode = lambda *a: self.order.append("encode") or encode(*a)

    @property
    def releases(self) -> int:
        return self.order.count("run")


def check_one_release(pipe: Any, handle: Any, runs: Runs) -> None:
    picture(pipe, "a red circle", num_inference_steps=3)
    picture(pipe, "a red circle", num_images_per_prompt=2, guidance_scale=1.0)
    picture(pipe, ["a red circle", "a red circle"])
    picture(pipe, **handle.release("a red circle").inputs(prompt="a wash"))
    assert runs.releases == 1
    assert runs.order.count("charge") == 1
    (entry,) = handle.report().releases
    assert entry["charges"] == 1


@BOTH
def test_steps_images_and_calls_share_one_release(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = protect(pipe, private)
    check_one_release(pipe, handle, Runs(handle, monkeypatch))


@BOTH
def test_a_release_per_step_is_caught(pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = protect(pipe, private, budget=dpx.Budget(1e4, 0.5))
    runs = Runs(handle, monkeypatch)
    pipe.unet.register_forward_pre_hook(lambda *a: handle.release("a red circle", fresh=True) and None)
    with pytest.raises(AssertionError):
        check_one_release(pipe, handle, runs)


@BOTH
def test_the_charge_comes_before_the_context_is_touched(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = protect(pipe, private)
    runs = Runs(handle, monkeypatch)
    handle.release("a red circle")
    assert runs.order[:3] == ["encode", "charge", "run"]  # first a public text, see test_charged_last.py
    assert "encode" in runs.order[3:]


@BOTH
def test_a_second_release_is_refused_before_it_is_computed(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = protect(pipe, private)
    first = handle.release("a red circle")
    runs = Runs(handle, monkeypatch)
    with pytest.raises(dpx.BudgetExceededError):
        handle.release("a red circle", fresh=True)
    assert runs.order == []
    assert handle.release("a red circle").contexts == first.contexts


def test_a_larger_budget_pays_for_a_second_release(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private, budget=dpx.Budget(20.0, 1e-4))
    first, second = (handle.release("a red circle", fresh=True) for _ in range(2))
    a, b = (r.contexts[0].structures[0].tensors()["sums"] for r in (first, second))
    assert not torch.equal(a, b)
    one, two = handle.report().releases
    assert one["name"] == two["name"] and one["charges"] == 2
    assert 8.0 < one["spent_epsilon"] <= 20.0


def test_the_ledger_outlives_the_handle(private: Any, tmp_path: Any) -> None:
    for attempt in range(2):
        pipe = tiny_sd()
        with protect(pipe, private, ledger=dpx.Ledger(tmp_path / "ledger.json")) as handle:
            if attempt == 0:
                handle.release("a red circle")
                assert "persistent" in handle.report().ledger
            else:
                with pytest.raises(dpx.BudgetExceededError):
                    picture(pipe, "a red circle")


def test_a_batch_is_charged_whole_or_not_at_all(
    pipe: Any, private: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = dpx.Ledger()
    with protect(pipe, private, ledger=ledger) as handle:
        handle.release("spent already")
    handle = protect(pipe, private, ledger=ledger)
    runs = Runs(handle, monkeypatch)
    with pytest.raises(dpx.BudgetExceededError):
        picture(pipe, ["new one", "spent already"])
    assert runs.order == [] and handle.report().releases == ()
    handle.release("new one")


@BOTH
def test_a_batch_has_a_release_and_a_budget_each(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release(["a red circle", "a blue star", "a red circle"])
    a, b, again = release.contexts
    assert a is again and a is not b and len(release) == 3
    assert release.inputs()["prompt_embeds"].shape == (3, 16, CHANNELS)
    assert [e["charges"] for e in handle.report().releases] == [1, 1]
    alone = picture(pipe, "a blue star", latents=latents())
    batch = picture(pipe, **release.inputs(), latents=latents().repeat(3, 1, 1, 1))
    assert torch.allclose(alone[0], batch[1], atol=1e-4)


def test_text_and_its_token_ids_are_one_context(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    ids = pipe.tokenizer("a red circle", return_tensors="pt").input_ids
    assert handle.release(ids).contexts == handle.release("a red circle").contexts
    assert handle.release(ids[0]).contexts == handle.release("a red circle").contexts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_embeddings_are_one_context_whatever_their_rank(dtype: torch.dtype, private: Any) -> None:
    unet = tiny_sd().unet
    rows = torch.randn(1, 16, CHANNELS).to(torch.float16).to(dtype)
    handle = protect(unet, private)
    first = handle.release(rows)
    assert handle.release(rows[0].clone()).contexts == first.contexts
    assert handle.release(rows.float()).contexts == first.contexts


def test_prompt_embeds_are_private_and_charged(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    rows = torch.randn(2, 16, CHANNELS)
    picture(pipe, prompt_embeds=rows)
    assert [e["guarantee"]["rows"] for e in handle.report().releases] == [16, 16]
    picture(pipe, prompt_embeds=rows, num_images_per_prompt=2)
    assert len(handle.report().releases) == 2


@BOTH
def test_nothing_public_is_charged(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release("a red circle")
    for text in ("a wash", "ink", "a wash"):
        picture(pipe, **release.inputs(prompt=text), negative_prompt=text)
    with handle.public():
        picture(pipe, "anything")
    assert len(handle.report().releases) == 1
