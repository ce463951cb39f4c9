"""Whatever would run past the release raises before the forward; `unprotect` gives the model back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig, MllamaForCausalLM
from transformers.cache_utils import DynamicCache

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.mllama.mllama_probing import find_layers
from hf_dp_xattn.privacy.bits import SeededEntropy

from ... import fail_closed
from .tiny import generate, images, texts, tiny


@pytest.fixture
def model() -> Any:
    return tiny()


def cross(model: Any) -> Any:
    return model.model.language_model.layers[1]


# ---- the probe -------------------------------------------------------------------------------------------------------------


def test_the_layers_are_found_and_nothing_changes(model: Any) -> None:
    model.train()
    before = {n: (id(m), id(getattr(m, "config", None)), m.training) for n, m in model.named_modules()}
    random = torch.get_rng_state()
    layers = find_layers(model)
    assert before == {
        n: (id(m), id(getattr(m, "config", None)), m.training) for n, m in model.named_modules()
    }
    assert torch.equal(random, torch.get_rng_state())
    assert list(layers) == [f"model.language_model.layers.{i}.cross_attn" for i in (1, 3)]
    assert all((layer.heads, layer.query_heads) == (2, 4) for layer in layers.values())


def test_a_way_around_cross_attention_is_found(model: Any, private: dpx.DPXAttnConfig) -> None:
    """A feed-forward part that also looks at the image."""
    seen = [0.0]

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("cross_attention_states") is not None:
            seen[0] = kwargs["cross_attention_states"].mean()

    model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    cross(model).mlp.register_forward_hook(lambda m, a, out: out + 1e-6 * seen[0])
    with pytest.raises(dpx.UnsupportedModelError, match="past the attention interface"):
        dpx.protect(model, private)


class Mixing(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + x.mean(dim=1, keepdim=True))


def test_projections_that_mix_rows_are_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    cross(model).cross_attn.k_proj.__class__ = Mixing
    with pytest.raises(dpx.UnsupportedModelError, match="mix"):
        dpx.protect(model, private)


def test_its_parts_are_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    for part in (model.model, model.model.vision_model, MllamaForCausalLM(model.config.text_config)):
        with pytest.raises(dpx.UnsupportedModelError):
            dpx.protect(part, private)


# ---- what was replaced -----------------------------------------------------------------------------------------------------


def replace_config(model: Any) -> None:
    cross(model).cross_attn.config = model.config.text_config


def replace_layer(model: Any) -> None:
    cross(model).cross_attn = cross(tiny()).cross_attn


def replace_vision_gate(model: Any) -> None:
    model.model.vision_model._forward_pre_hooks.clear()


def replace_vision_model(model: Any) -> None:
    model.model.vision_model = tiny().model.vision_model


LOST = (*fail_closed.LOST, replace_config, replace_layer, replace_vision_gate, replace_vision_model)


@pytest.mark.parametrize("change", LOST)
def test_a_lost_protection_is_noticed(
    change: Callable[[Any], None], model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(model, private)
    release = handle.release(**images(1))
    calls = (
        handle.check,
        lambda: release.inputs(**texts(1)),
        lambda: model.generate(**images(1), **texts(1), max_new_tokens=2),
    )
    fail_closed.check_lost(model, change, calls)


def test_changed_weights_are_noticed(model: Any, private: dpx.DPXAttnConfig) -> None:
    release = dpx.protect(model, private).release(**images(1))
    weight = cross(model).cross_attn.v_proj.weight
    fail_closed.check_changed_weights(weight, lambda: release.inputs(**texts(1)))


# ---- calls -----------------------------------------------------------------------------------------------------------------


def test_parts_of_a_protected_model_do_not_run(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    rows, ids = torch.randn(1, 10, 32), torch.tensor([[4, 5]])
    calls: tuple[Callable[[], Any], ...] = (
        lambda: model(**images(1), **texts(1)),
        lambda: model(cross_attention_states=rows, input_ids=ids),
        lambda: model.model.vision_model(**images(1)),
        lambda: model.model(**images(1), **texts(1)),
        lambda: model.model(cross_attention_states=rows, input_ids=ids),
        lambda: model.model.language_model(cross_attention_states=rows, input_ids=ids),
        lambda: cross(model).cross_attn(torch.randn(1, 2, 32), cross_attention_states=rows),
    )
    for call in calls:
        with pytest.raises(dpx.ProtectionLostError):
            call()
    assert not handle.report().releases


REFUSED: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": object()},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "prompt lookup by config": {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
    "guidance": {"guidance_scale": 2.0},
    "a static cache": {"cache_implementation": "static"},
    "a cache made elsewhere": {"past_key_values": DynamicCache()},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "other code": {"custom_generate": lambda *a, **k: None},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ways_of_generating_that_are_refused(kind: str, model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError):
        model.generate(**images(1), **texts(1), max_new_tokens=2, **REFUSED[kind])
    assert not handle.report().releases


def hide(token: int, tile: int) -> torch.Tensor:
    mask = texts(1)["cross_attention_mask"].clone()
    mask[0, token, 0, tile] = 0
    return mask


MASKS: dict[str, torch.Tensor] = {
    "one token sees fewer tiles": hide(3, 1),
    "no token sees a tile": texts(1)["cross_attention_mask"] * torch.tensor([1, 0]),
    "several images": texts(1)["cross_attention_mask"].repeat(1, 1, 2, 1),
    "another batch": texts(2)["cross_attention_mask"],
    "another rank": texts(1)["cross_attention_mask"][:, :, 0],
}


@pytest.mark.parametrize("mechanism", ["kernel_sum", "none"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_a_release_cannot_follow(
    kind: str, mechanism: str, model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(model, private.replace(mechanism=mechanism))
    inputs = {**texts(1), "cross_attention_mask": MASKS[kind]}
    with pytest.raises(dpx.ConfigError, match=r"cross_attention_mask|One image"):
        model.generate(**images(1), **inputs, max_new_tokens=2)
    assert not handle.report().releases
    release = handle.release(**images(1))
    with pytest.raises(dpx.ConfigError, match=r"cross_attention_mask|One image"):
        release.inputs(**inputs)
    given = release.inputs(**texts(1))
    with pytest.raises(dpx.ConfigError, match=r"cross_attention_mask|One image"):
        model(**{**given, "cross_attention_mask": MASKS[kind]})


def test_numbers_of_texts_and_images(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError, match="1 texts for 2 images"):
        model.generate(**images(2), **texts(1, mask=False), max_new_tokens=2)
    assert not handle.report().releases
    release = handle.release(**images(2))
    with pytest.raises(dpx.ConfigError, match="1 texts for 2 images"):
        release.inputs(**texts(1, mask=False))
    given = release.inputs(**texts(2, mask=False))
    with pytest.raises(dpx.ConfigError, match="1 texts"):
        model.generate(**{**given, **texts(1, mask=False)}, max_new_tokens=2)


def test_an_image_beside_a_release(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    release = handle.release(**images(1))
    given = release.inputs(**texts(1))
    with pytest.raises(dpx.ConfigError, match="public image"):
        release.inputs(**texts(1), **images(1))
    with pytest.raises(dpx.ConfigError, match="not both"):
        model.generate(**given, **images(1), max_new_tokens=2)
    with pytest.raises(dpx.ConfigError, match="not both"):
        model(**given, **images(1))
    with pytest.raises(dpx.ConfigError, match="tokenizer"):
        release.inputs("what is this?")
    with pytest.raises(dpx.ContextError, match="placeholder"):
        handle.release(given["cross_attention_states"])


def test_stale_and_foreign_placeholders(private: dpx.DPXAttnConfig) -> None:
    fail_closed.check_foreign(tiny, lambda h: h.release(**images(1)).inputs(**texts(1)), private)


def test_caches(model: Any, private: dpx.DPXAttnConfig) -> None:
    """One that holds an image names no release by itself, and one that was filled elsewhere is not read."""
    handle = dpx.protect(model, private)
    given = handle.release(**images(1)).inputs(**texts(1, mask=False))
    ids = torch.tensor([[7]])
    with torch.no_grad():
        own = model(**given, use_cache=True).past_key_values
        with pytest.raises(dpx.ProtectionLostError, match="every step"):
            model(input_ids=ids, past_key_values=own)
        states = given["cross_attention_states"]
        assert bool(
            model(input_ids=ids, past_key_values=own, cross_attention_states=states).logits.isfinite().all()
        )
        with handle.public():
            public = model(**images(1), **texts(1), use_cache=True).past_key_values
        with pytest.raises(dpx.ProtectionLostError):
            model(input_ids=ids, past_key_values=public)
        with pytest.raises(dpx.ReleaseError, match="past_key_values"):
            model(input_ids=ids, past_key_values=public, cross_attention_states=states)


def test_private_and_public_images_in_one_batch(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    states = handle.release(**images(1)).inputs(**texts(1))["cross_attention_states"]
    mixed = torch.cat([states, torch.randn_like(states)])
    with handle.public(), pytest.raises(dpx.ReleaseError, match="batch"):
        model(cross_attention_states=mixed, input_ids=torch.tensor([[4], [5]]))


# ---- restoring -------------------------------------------------------------------------------------------------------------


def test_unprotect_restores_bit_for_bit(model: Any, private: dpx.DPXAttnConfig) -> None:
    fail_closed.check_restored(model, lambda m: generate(m, {**images(), **texts()}), private)


def test_set_attn_implementation_leaves_the_protection(model: Any, private: dpx.DPXAttnConfig) -> None:
    release = dpx.protect(model, private, entropy=SeededEntropy(0)).release(**images())
    fail_closed.check_implementation(model, lambda m: generate(m, release.inputs(**texts())))
