"""Of several hundred tokens an accepted model is right, and one whose attention changes with the length is refused, or limited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama.modeling_llama import eager_attention_forward

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_probing import find_layers, position_limit

from .tiny import BUILDERS, UNUSUAL, tiny, tokens

MANY = 400


def far_off(handle: Any, count: int, prefix: int) -> float:
    """How far the logits behind an exact prefix are from the unprotected model's, over all `count` tokens."""
    model, ids = handle.model, tokens(count, 5)
    with torch.no_grad(), handle.public():
        want = model(input_ids=ids[None]).logits[:, prefix:]
    release = handle.release(ids[:prefix], prefix_bucket=prefix)
    with torch.no_grad():
        got = model(**release.inputs(input_ids=ids[None, prefix:])).logits
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", [*BUILDERS, *UNUSUAL])
def test_accepted_models_are_right_at_several_hundred_tokens(name: str, exact: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    try:
        handle = dpx.protect(model, exact)
    except dpx.UnsupportedModelError as error:
        assert name in UNUSUAL and type(model).__name__ in str(error)
        return
    count = min(handle.host.limit or MANY, MANY)
    for prefix in (5, count // 2, count - 6):
        assert far_off(handle, count, prefix) < 1e-4, prefix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_of_kept_tokens_is_found(dtype: torch.dtype, private: dpx.DPXAttnConfig) -> None:
    model = tiny("doge_64").to(dtype)
    with pytest.raises(dpx.UnsupportedModelError, match="tokens its attention is not the softmax over all"):
        dpx.protect(model, private)
    assert dpx.handle_of(model) is None


def test_a_length_that_no_probe_goes_beyond_is_a_limit(exact: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny("doge_2048"), exact)
    assert handle.host.limit == 2048
    with pytest.raises(dpx.ContextError, match="2048"):
        handle.release(tokens(9), prefix_bucket=2048)
    release = handle.release(tokens(9), prefix_bucket=2000)
    with pytest.raises(dpx.ConfigError, match="2048"):
        release.inputs(input_ids=tokens(49)[None])
    assert "input_ids" in release.inputs(input_ids=tokens(48)[None])


def _forgetful(window: int) -> str:
    """The name of an attention that forgets what is further behind than `window` tokens, though no configuration says so."""

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        n, m = key.shape[2], query.shape[2]
        back = torch.arange(n - m, n)[:, None] - torch.arange(n)
        hidden = (back < 0) | (back >= window)
        bias = torch.zeros(m, n, dtype=query.dtype).masked_fill(hidden, torch.finfo(query.dtype).min)
        return eager_attention_forward(module, query, key, value, bias, **kwargs)

    name = f"forgetful_{window}"
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [20, 150, 300])
def test_a_window_without_a_name_is_found(
    window: int, dtype: torch.dtype, private: dpx.DPXAttnConfig
) -> None:
    model = tiny("llama").to(dtype)
    model.set_attn_implementation(_forgetful(window))
    with pytest.raises(dpx.UnsupportedModelError, match="cannot be protected"):
        dpx.protect(model, private)


@pytest.mark.parametrize(
    ("name", "limit"), [("qwen2_window", 64), ("gemma3n", 64), ("phi3_window", 64), ("llama_yarn", None)]
)
def test_limits(name: str, limit: int | None) -> None:
    assert position_limit(tiny(name)) == limit


def test_a_window_counts_whatever_its_layers_are_called() -> None:
    model = tiny("mistral_window")
    model.config.layer_types = ["full_attention", "hybrid_sliding"]
    assert position_limit(model) == 256
    model.config.layer_types = ["full_attention"] * 2
    assert position_limit(model) is None


def test_the_probe_leaves_no_mark(monkeypatch: Any) -> None:
    """It runs over several hundred tokens, and the model and the random state are as before."""
    model, lengths = tiny("llama").train(), []
    hook = model.model.register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    state = torch.get_rng_state()
    find_layers(model)
    hook.remove()
    assert max(lengths) >= 320 and model.training and torch.equal(state, torch.get_rng_state())
