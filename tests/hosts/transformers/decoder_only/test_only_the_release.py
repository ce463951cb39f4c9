"""Invariants 1 and 7: with the release held fixed, two private prefixes give bitwise equal outputs; nothing else of them is kept."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import pickle
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.releases import Releases
from hf_dp_xattn.hosts.transformers.decoder_only import prefix_attention as attention
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_cache import PrefixCache

from .calibrations import protect
from .tiny import BUILDERS, VOCABULARY, generate, questions, segments, tiny, tokens

MECHANISMS = ("none", "kernel_sum", "dptree", "anchors")


def hold_the_release_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every context gets what the first one released: what differs afterwards did not come through the release."""
    original, first = Releases.run, []

    def fixed(self: Any, *args: Any) -> Any:
        result = original(self, *args)  # so that any way past the release would run
        first.append(result)
        return dataclasses.replace(result, structures=first[0].structures, context=first[0].context)

    monkeypatch.setattr(Releases, "run", fixed)


def check_equal_outputs(model: Any, handle: Any, **arguments: Any) -> None:
    """Two prefixes of other tokens and another length, the same public head and padded length."""
    found = []
    for count, seed in ((11, 1), (14, 2)):
        release = handle.release(tokens(count, seed), public_head=[1, 4], **arguments)
        found.append(generate(model, release.inputs(**questions()), num_beams=2))
    (ids_a, scores_a), (ids_b, scores_b) = found
    assert not bool(scores_a.isnan().any())
    assert torch.equal(ids_a, ids_b) and torch.equal(scores_a, scores_b)


@pytest.mark.parametrize("name", BUILDERS)
def test_outputs_depend_on_the_release_alone(
    name: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    handle = protect(model, private)
    hold_the_release_fixed(monkeypatch)
    check_equal_outputs(model, handle)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_whatever_the_mechanism(
    mechanism: str, name: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(name)
    handle = protect(model, private.replace(mechanism=mechanism, unit="context"))
    hold_the_release_fixed(monkeypatch)
    check_equal_outputs(model, handle)


def test_a_planted_leak_is_caught(private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's hidden states of the last prefix are kept aside, and one function reads them."""
    model = tiny("llama")
    handle = protect(model, private)
    hold_the_release_fixed(monkeypatch)
    kept, read = [], attention.read_partial

    def leak(*args: Any) -> Any:
        out, lse = read(*args)
        return out + 1e-3 * kept[0], lse

    def keep(module: Any, args: Any, out: torch.Tensor) -> None:
        if out.shape[1] > 10:  # of a prefix only
            kept[:] = [out[0, -1, 0]]

    model.model.layers[0].mlp.register_forward_hook(keep)
    monkeypatch.setattr(attention, "read_partial", leak)
    with pytest.raises(AssertionError):
        check_equal_outputs(model, handle)


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_equal_segments_elsewhere_are_encoded_bit_for_bit_alike(
    mechanism: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a segment becomes depends on the head and on itself alone: not on the others, their number or their order."""
    model, parts = tiny("llama"), segments((3, 5, 2), 4)
    handle = protect(model, private.replace(mechanism=mechanism, unit="group"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    run = type(handle.guard.prepare(handle.guard.fingerprint())).run

    def watch(self: Any, rows: torch.Tensor, groups: torch.Tensor, entropy: Any) -> Any:
        seen.append((rows.clone(), groups.clone()))
        return run(self, rows, groups, entropy)

    monkeypatch.setattr(type(handle.guard.prepare(handle.guard.fingerprint())), "run", watch)
    others = segments((4, 1), 9)
    handle.release(parts, groups="segments", public_head=[1, 4])
    handle.release([*others, parts[1]], groups="segments", public_head=[1, 4])
    (rows_a, groups_a), (rows_b, groups_b) = seen
    assert torch.equal(rows_a[groups_a == 1], rows_b[groups_b == 2]) and (groups_a == 1).sum() == 5


def test_the_model_never_receives_the_prefix(private: dpx.DPXAttnConfig) -> None:
    """While it generates, no module is given a private token or row; the cache holds own tokens only."""
    model, prefix, own = tiny("llama"), torch.full((9,), VOCABULARY - 1), questions()
    own["input_ids"][own["input_ids"] == VOCABULARY - 1] = 3
    handle = protect(model, private)
    release = handle.release(prefix, public_head=[1, 4])
    ids: list[torch.Tensor] = []
    lengths: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: ids.append(args[0]))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, args, out: lengths.append(args[0].shape[1]))
    out = model.generate(**release.inputs(**own), max_new_tokens=3, return_dict_in_generate=True)
    assert sum(i.shape[1] for i in ids) == 6 + 2 and max(lengths) == 6
    assert not any(bool((i[:, :6] == VOCABULARY - 1).any()) for i in ids[:1])
    cache = out.past_key_values
    assert isinstance(cache, PrefixCache) and cache.suffix == 6 + 2
    assert all(layer.keys.shape[2] == 8 for layer in cache.layers)


def test_a_cache_may_be_copied_and_holds_names_only(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    release = protect(model, private).release(tokens(9))
    inputs = release.inputs(**questions())
    cache = inputs["past_key_values"]
    other = pickle.loads(pickle.dumps(copy.deepcopy(cache)))
    assert other.tags == cache.tags and all(layer.keys is None for layer in other.layers)
    assert "4" not in repr(cache.tags[:0]) and "PrefixCache" in repr(cache)
    want = generate(model, inputs)[0]
    assert torch.equal(generate(model, {**inputs, "past_key_values": other})[0], want)


def test_nothing_private_in_texts(private: dpx.DPXAttnConfig, caplog: pytest.LogCaptureFixture) -> None:
    """Reports, reprs, errors and logs hold no token of the prefix and not how many there are."""
    model = tiny("llama")
    secret = [37, 38, 39, 37, 38, 39, 37]
    handle = protect(model, private.replace(unit="context"))
    with caplog.at_level(logging.DEBUG):
        release = handle.release(secret, public_head=[1])
        texts = [str(handle.report()), handle.report().to_json(), repr(handle), repr(release)]
        with pytest.raises(dpx.BudgetExceededError) as refused:
            handle.release(secret, public_head=[1], fresh=True)
        with pytest.raises(dpx.ContextError) as bad:
            handle.release([*secret, VOCABULARY])
    texts += [str(refused.value), str(bad.value), caplog.text, repr(release.contexts[0])]
    for text in texts:
        assert not any(shown in text for shown in ("37, 38", "38, 39", "[37", "'rows': 7", '"rows": 7'))
    assert release.guarantees[0].rows is None
    with pytest.raises(dpx.DPXAttnError):
        pickle.dump(release, io.BytesIO())


def test_an_encoding_that_fails_quotes_nothing(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    handle = protect(model, private)
    embed = model.get_input_embeddings()

    def fail(module: Any, args: Any) -> None:
        raise RuntimeError(f"tokens {args[0].tolist()}")

    hook = embed.register_forward_pre_hook(fail)
    with pytest.raises(dpx.ContextError) as error:
        handle.release([37, 38, 39])
    hook.remove()
    assert "37, 38" not in str(error.value) and error.value.__context__ is None
