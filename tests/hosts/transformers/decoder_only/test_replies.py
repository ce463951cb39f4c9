"""Replies behind public prefixes: those of the plain model, and a decoder that learns from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.reply_divergence import KEPT, divergence
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_layers import rows_of, run_recorded
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers
from hf_dp_xattn.hosts.transformers.decoder_only.replies import Asking, ask, end_ids, replying

from .test_public_prefixes import OPTIONS, public
from .tiny import VOCABULARY, tiny, tokens

HEAD = torch.tensor([1, 4])
QUESTIONS = [torch.tensor(q) for q in ([5, 6], [7, 8, 9], [9, 9, 5])]


def rows(model: Any, prefix: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Layers, and the rows of the head and of a prefix behind it."""
    layers = find_layers(model)
    with torch.no_grad():
        made = rows_of(run_recorded(model, layers, torch.cat([HEAD, prefix]).unsqueeze(0)))[0]
    return layers, made[: len(HEAD)], made[len(HEAD) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_replies_are_those_of_the_plain_model(name: str) -> None:
    """Prefixes [6]: every token of a reply has the plain model's probabilities, no other token counts; a shorter one changes nothing."""
    model, prefixes = tiny(name), [tokens(6, 1), tokens(6, 2)]
    layers, head, first = rows(model, prefixes[0])
    asking = Asking(QUESTIONS, 3, 5, ())
    contexts = [first, rows(model, prefixes[1])[2], first[:4]]
    with replying(model, layers, head, len(HEAD) + 6) as logits:
        replies = ask(logits, contexts, asking, torch.Generator().manual_seed(0))
    assert replies.ids.shape == (3, 3, 8) and replies.top.shape == (3, 3, 8, KEPT)
    for i, prefix in enumerate(prefixes):
        for ids, weight, top, logs in zip(*(getattr(replies, n)[i] for n in replies.TENSORS), strict=True):
            asked = next(len(q) for q in QUESTIONS if torch.equal(q, ids[: len(q)].long()))
            assert weight.nonzero()[:, 0].tolist() == list(range(asked - 1, asked + 4))
            text = torch.cat([HEAD, prefix, ids[: asked + 5].long()])
            with torch.no_grad():
                plain = model(input_ids=text.unsqueeze(0)).logits[0].log_softmax(-1)
            at = slice(len(HEAD) + len(prefix) + asked - 1, len(text) - 1)
            here = weight.bool()
            got = plain[at].gather(-1, top[here].long())
            torch.testing.assert_close(got, logs[here], atol=1e-4, rtol=1e-4)


def test_a_reply_ends_with_its_end_token() -> None:
    model, prefix = tiny("llama"), tokens(6, 1)
    layers, head, own = rows(model, prefix)
    everything = tuple(range(VOCABULARY))
    with replying(model, layers, head, len(HEAD) + len(prefix)) as logits:
        (short,) = ask(
            logits, [own], Asking(QUESTIONS, 2, 5, everything), torch.Generator().manual_seed(0)
        ).weight
    assert short.sum(-1).tolist() == [1.0, 1.0]
    assert end_ids(model) == (2,)


def test_exact_rows_do_not_diverge_and_others_do() -> None:
    model, prefix = tiny("llama"), tokens(6, 1)
    layers, head, own = rows(model, prefix)
    asked = [p.requires_grad for p in model.parameters()]
    configs = [layer.module.config for layer in layers.values()]
    model.train()
    with replying(model, layers, head, len(HEAD) + len(prefix)) as logits:
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        replies = ask(logits, [own], Asking(QUESTIONS, 2, 5, ()), torch.Generator().manual_seed(0))
        one = replies.one_each(torch.zeros(1, dtype=torch.int64))
        moved = own.unsqueeze(0).clone().requires_grad_()
        weights = torch.zeros(1, len(own), requires_grad=True)
        same = divergence(one, moved, weights, logits)
        other = divergence(one, moved + 1.0, weights, logits)
        other.sum().backward()
    assert abs(same.item()) < 1e-5 < 1e-3 < other.item()
    assert moved.grad is not None and weights.grad is not None
    assert bool((moved.grad != 0).any()) and bool((weights.grad != 0).any())
    assert model.training and [p.requires_grad for p in model.parameters()] == asked
    assert all(p.grad is None for p in model.parameters())
    assert [layer.module.config for layer in layers.values()] == configs


@pytest.mark.slow
def test_a_decoder_is_judged_by_replies() -> None:
    """They are closer to the exact ones than those of the public mean, and the better of looking at a release or not is chosen."""
    model = tiny("llama")
    config = dpx.DPXAttnConfig(mechanism="anchors", unit="group")
    contexts = public("group", 80, ragged=True)
    options: dict[str, Any] = {**OPTIONS, "epsilons": (64.0,), "query_steps": 4, "prefix_bucket": 16}
    options |= {"releases": ("sum",), "replies": 2}
    made = dpx.calibrate(model, contexts, config, steps=20, **options)
    told = made.settings["candidates"]
    assert told[0]["divergence"] < 0.7 * min(made.settings["nothing"].values())
    assert [t["release"] for t in told] == ["sum"] and all(t["divergence"] >= 0 for t in told)
    (chosen,) = told
    worth = made.plans[0].worth
    assert worth is not None and worth.measure == "divergence"
    # no context at all is asked as well: the exact head stands before every prefix
    assert set(made.settings["nothing"]) == {"mean", "none"}
    assert worth.against == min(made.settings["nothing"], key=made.settings["nothing"].__getitem__)
    (note,) = [n for n in dpx.plan(made).notes if n.startswith("replies:")]
    assert f"{chosen['divergence']:.2g} at 64" in note


def test_kernel_sums_have_no_decoder_to_train() -> None:
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context", degree=1, projection_dim=4)
    contexts = [tokens(5, i).tolist() for i in range(24)]
    with pytest.raises(dpx.ConfigError, match="kernel_sum"):
        dpx.calibrate(tiny("llama"), contexts, config, rank=0, **OPTIONS, replies=1)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no questions": ({"questions": None}, "questions"),
    "fewer than none": ({"replies": -1}, "at least 0"),
    "several positions": ({"prefix_bucket": None}, "prefix_bucket"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_cannot_be_asked(name: str) -> None:
    change, match = BAD[name]
    config = dpx.DPXAttnConfig(mechanism="anchors", unit="context")
    contexts = [tokens(3 if i % 2 else 70, i).tolist() for i in range(66)]
    options = {**OPTIONS, "steps": 5, "releases": ("sum",), "replies": 1, "prefix_bucket": 128, **change}
    with pytest.raises(dpx.ConfigError, match=match):
        dpx.calibrate(tiny("llama"), contexts, config, **options)
