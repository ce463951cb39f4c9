"""Whatever would run past the release raises before the forward; `unprotect` gives the model back."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache, GenerationConfig

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.decoder_only.prefix_attention import NAME, dp_xattn_prefix

from .calibrations import protect
from .tiny import BUILDERS, generate, questions, tiny, tokens

OWN = torch.tensor([[5, 6, 7]])


@pytest.fixture
def model() -> Any:
    return tiny("llama")


def replace_config(model: Any) -> None:
    model.model.layers[1].self_attn.config = model.config


def switch_layer(model: Any) -> None:
    model.model.layers[1].self_attn.config._attn_implementation = "sdpa"


def replace_layer(model: Any) -> None:
    model.model.layers[1].self_attn = tiny("llama").model.layers[1].self_attn


def replace_generate(model: Any) -> None:
    del model.__dict__["generate"]


def replace_gate(model: Any) -> None:
    model._forward_pre_hooks.clear()


def replace_function(model: Any) -> None:
    AttentionInterface.register(NAME, lambda *a, **k: None)


@pytest.mark.parametrize(
    "change",
    [replace_config, switch_layer, replace_layer, replace_generate, replace_gate, replace_function],
)
def test_what_replaces_a_part_is_noticed(
    model: Any, change: Callable[[Any], None], private: dpx.DPXAttnConfig
) -> None:
    handle = protect(model, private)
    inputs = handle.release(tokens(9)).inputs(input_ids=OWN)
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    try:
        change(model)
        for use in (
            lambda: handle.release(tokens(9, 1)),
            lambda: handle.release(tokens(9)).inputs(input_ids=OWN),
            lambda: model.generate(**inputs, max_new_tokens=2),
        ):
            with pytest.raises(dpx.ProtectionLostError):
                use()
    finally:
        AttentionInterface.register(NAME, dp_xattn_prefix)
    assert not ran


def test_another_implementation_for_the_model_changes_nothing(model: Any, private: dpx.DPXAttnConfig) -> None:
    release = protect(model, private).release(tokens(9))
    want = generate(model, release.inputs(**questions()))
    model.set_attn_implementation("eager")
    got = generate(model, release.inputs(**questions()))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    handle = dpx.handle_of(model)
    assert handle is not None
    with handle.public():  # the host's own attention, and the masks that go with it
        public = model(input_ids=OWN).logits
    plain = tiny("llama")
    plain.set_attn_implementation("eager")
    assert torch.equal(public, plain(input_ids=OWN).logits)


def test_without_a_release_nothing_runs(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(model, private)
    ids = {"input_ids": OWN}
    for use in (
        lambda: model(**ids),
        lambda: model(**ids, past_key_values=DynamicCache()),
        lambda: model.generate(**ids, max_new_tokens=2),
        lambda: model.generate(**ids, past_key_values=DynamicCache(), max_new_tokens=2),
        lambda: model.model(**ids),
        lambda: model.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
        ),
    ):
        with pytest.raises(dpx.ProtectionLostError):
            use()
    plain = tiny("llama")
    with handle.public():
        assert torch.equal(model(**ids).logits, plain(**ids).logits)
        assert torch.equal(model.generate(**ids, max_new_tokens=3), plain.generate(**ids, max_new_tokens=3))


REFUSED: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "static cache": {"cache_implementation": "static"},
    "offloaded cache": {"cache_implementation": "offloaded"},
    "guidance": {"guidance_scale": 2.0},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 2},
    "positions": {"position_ids": torch.arange(3).unsqueeze(0)},
    "layer contrast": {"dola_layers": "high"},
    "own code": {"custom_generate": lambda *a, **k: None},
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("by", ["argument", "config"])
def test_ways_that_are_not_supported_are_refused(
    way: str, by: str, model: Any, private: dpx.DPXAttnConfig
) -> None:
    options = REFUSED[way]
    inputs = protect(model, private).release(tokens(9)).inputs(input_ids=OWN)
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    if by == "config":
        if way in ("positions", "own code"):
            pytest.skip("not a setting")
        config = GenerationConfig(max_new_tokens=2)
        for name, value in options.items():
            setattr(config, name, value)
        options = {"generation_config": config}
    with pytest.raises(dpx.ConfigError, match="not supported"):
        model.generate(**inputs, **{"max_new_tokens": 2, **options})
    assert not ran


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_positions_of_a_direct_call_are_refused(name: str, private: dpx.DPXAttnConfig) -> None:
    """Positions are counted behind the padded prefix; other ones would move the logits. `generate` hands its own to the model."""
    model = tiny(name)
    inputs = protect(model, private).release(tokens(9)).inputs(**questions())
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    for given in (
        {"position_ids": torch.arange(6).unsqueeze(0)},
        {"token_type_ids": torch.zeros(2, 6).long()},
    ):
        with pytest.raises(dpx.ConfigError, match="not supported"):
            model(**inputs, **given)
    assert not ran
    out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    follows = {"input_ids": out.sequences[:, -1:], "past_key_values": out.past_key_values}
    model(**follows)
    with pytest.raises(dpx.ConfigError, match="position_ids"):  # the cache of generate is no way around
        model(**follows, position_ids=torch.full((2, 1), 3))


@pytest.mark.slow
def test_compiled_with_graph_breaks(private: dpx.DPXAttnConfig) -> None:
    """The gate is never traced, so each call reads its own release, recompiled or not; a whole graph is refused by torch."""
    model = tiny("llama")
    handle = protect(model, private)
    releases = [handle.release(tokens(9, seed)) for seed in range(10)]
    want = [model(**r.inputs(input_ids=OWN)).logits for r in releases]
    replies = [model.generate(**r.inputs(input_ids=OWN), max_new_tokens=3) for r in releases]
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, backend="eager")
        for release, logits, reply in zip(releases, want, replies, strict=True):
            assert torch.equal(compiled(**release.inputs(input_ids=OWN)).logits, logits)
            assert torch.equal(compiled.generate(**release.inputs(input_ids=OWN), max_new_tokens=3), reply)
        with pytest.raises(dpx.ProtectionLostError):
            compiled(input_ids=OWN)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(model, backend="eager", fullgraph=True)(**releases[0].inputs(input_ids=OWN))
        torch._dynamo.reset()
        model.compile(backend="eager")
        assert torch.equal(model(**releases[1].inputs(input_ids=OWN)).logits, want[1])
        with pytest.raises(dpx.ProtectionLostError):
            model(input_ids=OWN)
    finally:
        torch._dynamo.reset()


def test_assistants_and_continuous_batching_are_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(model, private)
    inputs = handle.release(tokens(9)).inputs(input_ids=OWN)
    with pytest.raises(dpx.ConfigError, match="assisted"):
        model.generate(**inputs, assistant_model=tiny("llama"), max_new_tokens=2)
    for access in (contextlib.nullcontext(), handle.public()):  # its thread would not see the permission
        with access, pytest.raises(dpx.ConfigError, match="Continuous"):
            model.generate_batch([[5, 6]], generation_config=GenerationConfig(max_new_tokens=2))


def test_a_protected_model_is_no_assistant(model: Any, private: dpx.DPXAttnConfig) -> None:
    protect(model, private)
    with pytest.raises(dpx.ProtectionLostError):
        tiny("llama").generate(input_ids=OWN, assistant_model=model, max_new_tokens=2)


def test_inputs_that_do_not_belong_together_are_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(model, private)
    release = handle.release(tokens(9))
    inputs = release.inputs(input_ids=OWN)
    cache = inputs["past_key_values"]
    mask = torch.ones(1, 3, dtype=torch.int64)
    for changes in (
        {"attention_mask": mask},
        {"attention_mask": None},
        {"input_ids": OWN[:, :2]},
        {"past_key_values": cache, "inputs_embeds": torch.zeros(1, 3, 32)},
    ):
        with pytest.raises(dpx.ConfigError):
            model.generate(**{**inputs, **changes}, max_new_tokens=2)
    with pytest.raises(dpx.ConfigError):
        model(**{**inputs, "attention_mask": mask})
    with pytest.raises(dpx.ConfigError):
        model(**{**inputs, "use_cache": False})
    with pytest.raises(dpx.ProtectionLostError, match="batch"):
        model(input_ids=OWN.repeat(2, 1), past_key_values=cache)
    for bad in ({}, {"input_ids": OWN[:, :0]}, {"input_ids": OWN, "attention_mask": mask[:, :2]}):
        with pytest.raises(dpx.ConfigError):
            release.inputs(**bad)
    with pytest.raises(dpx.ConfigError):
        release.inputs("a text", input_ids=OWN)
    other = handle.release(tokens(70))
    both = dpx.Release([*release.contexts, *other.contexts], handle.config, handle)
    with pytest.raises(dpx.ReleaseError, match="padded lengths"):
        both.inputs(input_ids=OWN.repeat(2, 1))
    with pytest.raises(dpx.ConfigError, match="2 prefixes"):
        both.inputs(input_ids=OWN.repeat(3, 1))


def test_a_cache_of_another_protection_names_nothing(model: Any, private: dpx.DPXAttnConfig) -> None:
    with protect(model, private) as handle:
        inputs = handle.release(tokens(9)).inputs(input_ids=OWN)
    protect(model, private)
    with pytest.raises(dpx.ReleaseError):
        model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "gemma3", "olmo3", "cohere2"])
def test_beyond_a_sliding_window_is_refused(name: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = protect(model, private)
    release = handle.release(tokens(150))  # 192 positions of 256
    inputs = release.inputs(input_ids=OWN)
    generate(model, inputs, max_new_tokens=62, min_new_tokens=1)
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    with pytest.raises(dpx.ConfigError, match="window of 256"):
        model.generate(**inputs, max_new_tokens=63)
    with pytest.raises(dpx.ConfigError, match="window of 256"):
        release.inputs(input_ids=tokens(65).unsqueeze(0))
    assert not ran
    with pytest.raises(dpx.ContextError, match="no room"):
        handle.release(tokens(200))


def test_a_window_that_the_config_does_not_tell_is_refused_too(
    model: Any, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed = tiny("mistral_window")
    handle = protect(windowed, private)
    release = handle.release(tokens(150))
    monkeypatch.setattr(
        "hf_dp_xattn.hosts.transformers.decoder_only.prefix_encoder.position_limit", lambda *_: None
    )
    inputs = release.inputs(input_ids=tokens(65).unsqueeze(0))
    with pytest.raises(dpx.ConfigError, match="window"):
        windowed(**inputs)


def test_learned_positions_end(private: dpx.DPXAttnConfig) -> None:
    model = tiny("gpt2")
    handle = protect(model, private)
    with pytest.raises(dpx.ContextError, match="no room"):
        handle.release(tokens(500))
    release = handle.release(tokens(440))
    with pytest.raises(dpx.ConfigError):
        model.generate(**release.inputs(input_ids=OWN), max_new_tokens=100)


@pytest.mark.parametrize(
    ("training", "name"), [*((False, n) for n in BUILDERS), *((True, n) for n in ("llama", "gpt2", "gemma2"))]
)
def test_unprotect_restores_bit_for_bit(name: str, training: bool, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name).train(training)
    modes = [m.training for m in model.modules()]
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    with protect(model, private) as handle:
        assert dpx.protect(model, private, calibration=handle.calibration) is handle
        handle.release(tokens(5)).inputs(input_ids=OWN)
    after = {n: dict(m.__dict__) for n, m in model.named_modules()}
    for n, attributes in before.items():
        assert attributes.keys() == after[n].keys()
        assert attributes.get("config") is after[n].get("config")
    assert modes == [m.training for m in model.modules()]
    model.eval()
    plain = tiny(name)
    assert torch.equal(model(input_ids=OWN).logits, plain(input_ids=OWN).logits)
    want = plain.generate(input_ids=OWN, max_new_tokens=3)
    assert torch.equal(model.generate(input_ids=OWN, max_new_tokens=3), want)


def test_protected_models_are_not_copied(model: Any, private: dpx.DPXAttnConfig) -> None:
    protect(model, private)
    for use in (copy.deepcopy, pickle.dumps):
        with pytest.raises(dpx.DPXAttnError):
            use(model)


def test_other_threads_see_no_release(model: Any, private: dpx.DPXAttnConfig) -> None:
    """While one thread is inside the model, another one that calls a layer by itself finds nothing to read."""
    release = protect(model, private).release(tokens(9))
    errors: list[BaseException] = []

    def other() -> None:
        try:
            model.model.layers[0].self_attn(
                torch.zeros(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8), torch.zeros(1, 2, 8))
            )
        except BaseException as error:
            errors.append(error)

    def inside(*_: Any) -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    model.model.layers[0].mlp.register_forward_hook(inside)
    model(**release.inputs(input_ids=OWN))
    assert len(errors) == 1 and isinstance(errors[0], dpx.ProtectionLostError)


def test_weights_that_change_before_a_cached_forward_are_noticed(
    model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = protect(model, private)
    release = handle.release(tokens(12), public_head=1)
    first = model(**release.inputs(input_ids=OWN))
    step = {"input_ids": torch.tensor([[9]]), "past_key_values": first.past_key_values}
    assert bool(model(**step).logits.isfinite().all())
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    with pytest.raises(dpx.ReleaseError, match="fit this model"):
        model(**step)


def test_inputs_of_a_model_that_was_unprotected_are_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    """It would answer as if it had no prefix, which looks healthy."""
    handle = protect(model, private)
    inputs = handle.release(tokens(12), public_head=1).inputs(input_ids=OWN)
    dpx.unprotect(model)
    with pytest.raises(dpx.ReleaseError, match="unprotected since"):
        generate(model, inputs)


@pytest.mark.parametrize("pickled", [False, True], ids=["as given", "pickled"])
def test_inputs_for_one_replica_are_refused_by_another(
    pickled: bool, model: Any, private: dpx.DPXAttnConfig
) -> None:
    """Not protected, it would answer as if it had no prefix."""
    replica = copy.deepcopy(model)
    inputs = protect(model, private).release(tokens(12)).inputs(input_ids=OWN)
    if pickled:
        inputs = pickle.loads(pickle.dumps(inputs))
    want = generate(model, inputs)[0]
    with pytest.raises(dpx.ReleaseError, match="another one"):
        replica(**inputs)
    with pytest.raises(dpx.ReleaseError, match="another one"):
        generate(replica, inputs)
    assert torch.equal(generate(model, inputs)[0], want)


def test_other_rotary_frequencies_are_other_weights(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = protect(model, private)
    release = handle.release(tokens(12))
    inputs = release.inputs(input_ids=OWN)
    model.model.rotary_emb.inv_freq.mul_(0.25)
    with pytest.raises(dpx.ReleaseError, match="fit this model"):
        model(**inputs)
    with pytest.raises(dpx.ReleaseError, match="fit this model"):
        release.inputs(input_ids=OWN)
    model.model.rotary_emb.inv_freq.div_(0.25)
    model(**inputs)
    model.model.rotary_emb.inv_freq.data.mul_(0.25)  # not counted: seen by the next look at the weights
    with pytest.raises(dpx.ReleaseError, match="fit this model"):
        model(**release.inputs(input_ids=OWN))


def test_adapters_of_one_call_are_refused(private: dpx.DPXAttnConfig) -> None:
    """PEFT's `adapter_names` acts by hooks within the call."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, r=4)
    model = get_peft_model(tiny("llama"), lora)
    model.add_adapter("b", lora)
    model.eval()
    base = model.get_base_model()
    with dpx.protect(base, private, ledger=dpx.Ledger()) as handle:
        inputs = handle.release(tokens(12)).inputs(input_ids=OWN)
        with pytest.raises(dpx.ProtectionLostError, match="one call"):
            model(**inputs, adapter_names=["b"])
        assert bool(model(**inputs).logits.isfinite().all())
