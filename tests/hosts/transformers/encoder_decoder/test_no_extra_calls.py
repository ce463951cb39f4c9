"""A protected model calls each of its modules as often as the unprotected one: users' hooks and profilers see no call of ours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import one, tiny

IDS = torch.tensor([[2, 7, 9]])
MECHANISMS = ("kernel_sum", "anchors", "dptree", "none")


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """How often each module is called; those of the encoder, which a release stands in for, are left out."""
    names = {module: name for name, module in model.named_modules()}
    counts: Counter[str] = Counter()

    def count(module: Any, *_: Any) -> None:
        if module in names:
            counts[names[module]] += 1

    hook = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**inputs, decoder_input_ids=IDS).logits
    return out


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("name", ["bart", "t5", "bert2bert_wider"])
def test_a_forward_makes_no_further_calls(name: str, mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    with torch.no_grad():
        states = model.get_encoder()(**one(name))
    with counted(model) as want:
        logits(model, {"encoder_outputs": states})
    config = private.replace(mechanism=mechanism, tree_bins=4)
    with protect(model, config, ledger=dpx.Ledger()) as handle:
        release = handle.release(**one(name))
        for public in ({}, {"input_ids": torch.tensor([[5, 6]])}):
            inputs = release.inputs(**public)
            for _ in range(2):
                with counted(model) as found:
                    logits(model, inputs)
                assert found == want
        with counted(model) as found:  # making the inputs as well
            logits(model, release.inputs())
        assert found == want


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_release_calls_no_cross_attention(mechanism: str, private: dpx.DPXAttnConfig) -> None:
    """Rows are projected past the hooks of the layer that does it, when a release is made and when it is first read."""
    model, calls = tiny("bart"), []
    config = private.replace(mechanism=mechanism, tree_bins=4)
    with protect(model, config, ledger=dpx.Ledger()) as handle:
        layers = [layer.module for layer in handle.layers.values()]
        hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
        inputs = handle.release(**one("bart")).inputs()
        assert not calls
        logits(model, inputs)
        assert len(calls) == len(layers)
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_calls_that_were_spared_gave_the_same_numbers(mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    config = private.replace(mechanism=mechanism, tree_bins=4)
    with protect(model, config, ledger=dpx.Ledger()) as handle:
        inputs = handle.release(**one("bart")).inputs()
        spared = logits(model, inputs)
        handle.host.weights.forget()
        handle.guard._built, handle.host.calls.seen = None, None
        handle.guard._tables.clear()
        assert torch.equal(logits(model, inputs), spared)


def _change(layer: Any, how: str) -> None:
    with torch.no_grad():
        if how == "in place":
            layer.k_proj.weight.mul_(1.5)
        elif how == "another parameter":
            layer.k_proj.weight = torch.nn.Parameter(layer.k_proj.weight * 1.5)
        else:
            layer.k_proj.weight.data = layer.k_proj.weight.data * 1.5


@pytest.mark.parametrize("how", ["in place", "another parameter", "another storage"])
def test_changed_weights_are_seen_at_the_next_forward(how: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    with protect(model, private, ledger=dpx.Ledger()) as handle:
        release = handle.release(**one("bart"))
        logits(model, release.inputs())
        inputs = release.inputs()
        _change(next(iter(handle.layers.values())).module, how)
        with pytest.raises(dpx.ReleaseError, match="differ"):
            logits(model, inputs)
        with pytest.raises(dpx.ReleaseError, match="differ"):
            release.inputs()
    with protect(model, private.replace(mechanism="anchors"), ledger=dpx.Ledger()) as handle:
        release = handle.release(**one("bart"))
        before = logits(model, release.inputs())
        _change(next(iter(handle.layers.values())).module, how)
        inputs = release.inputs()
        after = logits(model, inputs)
        assert not torch.allclose(after, before)
        handle.host.weights.forget()
        handle.guard._built, handle.host.calls.seen = None, None
        handle.guard._tables.clear()
        assert torch.equal(logits(model, inputs), after)
