"""`mechanism="none"` is the unprotected model over the whole sequence: same tokens, logits to 1e-5, for each architecture and way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TextStreamer

import hf_dp_xattn as dpx

from .tiny import BUILDERS, generate, questions, segments, tiny, tokens

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams and returns": {"num_beams": 3, "num_return_sequences": 2},
    "sampling and returns": {"do_sample": True, "num_return_sequences": 2},
}
TOLERANCE = 1e-5
PREFIX = 11


def whole(prefix: torch.Tensor, own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain model's inputs: the prefix before each text; padding stands before the prefix's end only in the mask."""
    ids, mask = own["input_ids"], own["attention_mask"]
    before = prefix.expand(len(ids), -1)
    return {
        "input_ids": torch.cat([before, ids], 1),
        "attention_mask": torch.cat([torch.ones_like(before), mask], 1),
    }


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((((a - b).abs() <= TOLERANCE * b.abs().clamp_min(1.0)) | (a == b)).all())


@pytest.mark.parametrize("name", BUILDERS)
def test_generate_is_that_of_the_unprotected_model(name: str, exact: dpx.DPXAttnConfig) -> None:
    model, prefix, own = tiny(name), tokens(PREFIX), questions()
    before = {way: generate(model, whole(prefix, own), **options) for way, options in WAYS.items()}
    handle = dpx.protect(model, exact)
    release = handle.release(prefix, public_head=3, prefix_bucket=PREFIX - 3)
    inputs = release.inputs(**own)
    for way, options in WAYS.items():
        for given_inputs in (inputs, release.inputs(**own)):  # inputs may be used again
            ids, scores = generate(model, given_inputs, **options)
            assert torch.equal(ids, before[way][0]) and close(scores, before[way][1]), way
    assert len(handle.report().releases) == len(release) == 1


@pytest.mark.parametrize("name", BUILDERS)
def test_forward_and_its_gradient(name: str, exact: dpx.DPXAttnConfig) -> None:
    model, prefix, own = tiny(name), tokens(PREFIX), tokens(5, 1).unsqueeze(0)
    want = model(input_ids=torch.cat([prefix.unsqueeze(0), own], 1)).logits[:, PREFIX:]
    release = dpx.protect(model, exact).release(prefix, prefix_bucket=PREFIX)
    got = model(**release.inputs(input_ids=own)).logits
    assert close(got, want)
    got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_half_precision(name: str, dtype: torch.dtype, exact: dpx.DPXAttnConfig) -> None:
    model, prefix, own = tiny(name).to(dtype), tokens(PREFIX), tokens(5, 1).unsqueeze(0)
    want = model(input_ids=torch.cat([prefix.unsqueeze(0), own], 1)).logits[:, PREFIX:]
    release = dpx.protect(model, exact).release(prefix, prefix_bucket=PREFIX)
    got = model(**release.inputs(input_ids=own)).logits
    assert got.dtype == dtype
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whatever_the_host_attends_with(implementation: str, exact: dpx.DPXAttnConfig) -> None:
    model, prefix, own = tiny("llama"), tokens(PREFIX), questions()
    model.set_attn_implementation(implementation)
    want = generate(model, whole(prefix, own))
    release = dpx.protect(model, exact).release(prefix, prefix_bucket=PREFIX)
    ids, scores = generate(model, release.inputs(**own))
    assert torch.equal(ids, want[0]) and close(scores, want[1])


def naive_windows(
    model: Any, head: torch.Tensor, parts: list[torch.Tensor], slots: int, own: torch.Tensor
) -> torch.Tensor:
    """Logits of own tokens [m] behind parallel context windows, by one ordinary forward with explicit positions and mask."""
    h, m = len(head), len(own)
    ids = torch.cat([head, *parts, own])
    positions = torch.cat(
        [
            torch.arange(h),
            *(h + torch.arange(len(p)) for p in parts),
            h + slots + torch.arange(m),
        ]
    )
    window = torch.cat([torch.zeros(h), *(torch.full((len(p),), i + 1.0) for i, p in enumerate(parts))])
    n = len(ids)
    visible = torch.ones(n, n, dtype=torch.bool).tril()
    inside = n - m
    visible[:inside, :inside] &= (window == window.unsqueeze(1)) | (window == 0)
    bias = torch.zeros(n, n).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = model(
            input_ids=ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=bias[None, None],
            use_cache=False,
        )
    logits: torch.Tensor = out.logits[0, inside:]
    return logits


@pytest.mark.parametrize("lengths", [(4,), (3, 1, 5), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "phi", "olmo2", "deepseek_v3"])
def test_segments_are_parallel_context_windows(
    name: str, head: int, lengths: tuple[int, ...], exact: dpx.DPXAttnConfig
) -> None:
    model, fixed, own = tiny(name), tokens(head, 5), tokens(4, 6)
    parts = segments(lengths)
    want = naive_windows(model, fixed, [torch.tensor(p) for p in parts], 64, own)
    release = dpx.protect(model, exact.replace(unit="group")).release(
        parts, groups="segments", public_head=fixed
    )
    assert close(model(**release.inputs(input_ids=own)).logits[0], want)


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    head=st.integers(0, 3),
    bucket=st.integers(5, 9),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_any_split_into_windows(lengths: list[int], head: int, bucket: int, seed: int) -> None:
    model, fixed, own = tiny("llama"), tokens(head, seed + 1), tokens(3, seed + 2)
    parts = segments(lengths, seed)
    want = naive_windows(model, fixed, [torch.tensor(p) for p in parts], bucket, own)
    with dpx.protect(model, dpx.DPXAttnConfig(mechanism="none", unit="group")) as handle:
        release = handle.release(parts, groups="segments", public_head=fixed, prefix_bucket=bucket)
        assert close(model(**release.inputs(input_ids=own)).logits[0], want)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_prefixes_of_different_lengths_in_one_batch(name: str, exact: dpx.DPXAttnConfig) -> None:
    model, own = tiny(name), questions()
    handle = dpx.protect(model, exact)
    releases = [handle.release(tokens(n, n)) for n in (5, 9)]
    want = [
        generate(model, r.inputs(**{k: v[i : i + 1] for k, v in own.items()})) for i, r in enumerate(releases)
    ]
    both = dpx.Release([c for r in releases for c in r.contexts], exact, handle)
    for beams in (1, 3):
        ids, scores = generate(model, both.inputs(**own), num_beams=beams)
        if beams == 1:
            assert torch.equal(ids, torch.cat([w[0] for w in want]))
            assert close(scores, torch.cat([w[1] for w in want], dim=1))
    alone = generate(model, releases[1].inputs(**{k: v[1:] for k, v in own.items()}), num_beams=3)[0]
    assert torch.equal(ids[1:], alone)


def test_a_batch_of_prefixes_in_one_tensor(exact: dpx.DPXAttnConfig) -> None:
    model, own = tiny("llama"), questions()
    handle = dpx.protect(model, exact)
    prefixes = tokens(12).view(2, 6)
    release = handle.release(prefixes, public_head=2)
    assert len(release) == 2
    one = handle.release(prefixes[1], public_head=2)
    assert one.contexts[0] is release.contexts[1]
    ids = generate(model, release.inputs(**own))[0]
    assert torch.equal(ids[1:], generate(model, one.inputs(**{k: v[1:] for k, v in own.items()}))[0])


def test_turns(exact: dpx.DPXAttnConfig) -> None:
    """A second turn with all tokens so far, or with the cache of the first and the new tokens only."""
    model, prefix, first = tiny("llama"), tokens(PREFIX), tokens(4, 1).unsqueeze(0)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    reply = model.generate(input_ids=torch.cat([prefix.unsqueeze(0), first], 1), **options).sequences
    then = torch.cat([reply, tokens(3, 2).unsqueeze(0)], 1)
    want = model.generate(input_ids=then, **options).sequences[:, PREFIX:]
    release = dpx.protect(model, exact).release(prefix, prefix_bucket=PREFIX)
    out = model.generate(**release.inputs(input_ids=first), **options)
    assert torch.equal(out.sequences, reply[:, PREFIX:])
    again = release.inputs(input_ids=then[:, PREFIX:])
    assert torch.equal(model.generate(**again, **options).sequences, want)
    cache = out.past_key_values
    new = then[:, PREFIX + cache.suffix :]
    mask = torch.ones(1, PREFIX + cache.suffix + new.shape[1], dtype=torch.int64)
    more = model.generate(input_ids=new, attention_mask=mask, past_key_values=cache, **options).sequences
    assert torch.equal(more, want[:, cache.suffix :])
    with pytest.raises(dpx.ConfigError, match=r"release\.inputs"):
        model.generate(input_ids=then[:, PREFIX:], attention_mask=mask, past_key_values=cache, **options)


def test_streaming(exact: dpx.DPXAttnConfig) -> None:
    class Words(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None: ...

    model, own = tiny("llama"), tokens(4, 1).unsqueeze(0)
    release = dpx.protect(model, exact).release(tokens(PREFIX))
    streamer = Words()
    out = model.generate(**release.inputs(input_ids=own), max_new_tokens=4, streamer=streamer)
    assert streamer.seen == out[0].tolist()
