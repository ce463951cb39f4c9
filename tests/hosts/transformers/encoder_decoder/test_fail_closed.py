"""Whatever would run past the release raises before the forward; `unprotect` gives the model back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    Wav2Vec2FeatureExtractor,
    pipeline,
)

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_attention import NAME
from hf_dp_xattn.privacy.bits import SeededEntropy

from ... import fail_closed
from .tiny import BUILDERS, documents, generate, one, tiny
from .words import word_tokenizer

IDS = torch.tensor([[4, 5]])


@pytest.fixture
def model() -> Any:
    return tiny("bart")


def replace_config(model: Any) -> None:
    model.model.decoder.layers[1].encoder_attn.config = model.config


def replace_layer(model: Any) -> None:
    layer = model.model.decoder.layers[1]
    layer.encoder_attn = tiny("bart").model.decoder.layers[1].encoder_attn


def replace_encoder_gate(model: Any) -> None:
    model.get_encoder()._forward_pre_hooks.clear()


def replace_encoder(model: Any) -> None:
    model.model.encoder = tiny("bart").model.encoder


LOST = (*fail_closed.LOST, replace_config, replace_layer, replace_encoder_gate, replace_encoder)


@pytest.mark.parametrize("change", LOST)
def test_a_lost_protection_is_noticed(
    change: Callable[[Any], None], model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(model, private)
    release = handle.release(**one("bart"))
    calls = (handle.check, release.inputs, lambda: model.generate(**one("bart"), max_new_tokens=2))
    fail_closed.check_lost(model, change, calls)


def test_set_attn_implementation_leaves_the_protection(model: Any, private: dpx.DPXAttnConfig) -> None:
    release = dpx.protect(model, private, entropy=SeededEntropy(0)).release(**one("bart"))
    fail_closed.check_implementation(model, lambda m: generate(m, release.inputs()))


@pytest.mark.parametrize("name", ["bart", "t5", "bert2gpt2"])
def test_public_documents_follow_set_attn_implementation(name: str, private: dpx.DPXAttnConfig) -> None:
    plain, protected = tiny(name), tiny(name)
    for model in (plain, protected):
        model.set_attn_implementation("eager")
    handle = dpx.protect(protected, private)
    for model in (plain, protected):
        model.set_attn_implementation("sdpa")
    want = generate(plain, documents(name))
    with handle.public():
        got = generate(protected, documents(name))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_parts_of_a_protected_model_do_not_run(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    states = torch.randn(1, 5, 16)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: model(**one("bart"), decoder_input_ids=IDS),
        lambda: model(encoder_outputs=(states,), decoder_input_ids=IDS),
        lambda: model.get_encoder()(**one("bart")),
        lambda: model.model(encoder_outputs=(states,), decoder_input_ids=IDS),
        lambda: model.get_decoder()(input_ids=IDS, encoder_hidden_states=states),
        lambda: model.model.decoder.layers[0].encoder_attn(torch.randn(1, 2, 16), key_value_states=states),
    )
    for call in calls:
        with pytest.raises(dpx.ProtectionLostError):
            call()
    assert not handle.report().releases


def test_the_function_set_by_hand_has_no_release(model: Any) -> None:
    model.set_attn_implementation(NAME)
    with pytest.raises(dpx.ProtectionLostError, match="by hand"):
        model(**one("bart"), decoder_input_ids=IDS)


REFUSED: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": object()},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "prompt lookup by config": {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
    "n-grams of the document": {"encoder_no_repeat_ngram_size": 2},
    "repetition of the document": {"encoder_repetition_penalty": 1.5},
    "guidance": {"guidance_scale": 2.0},
    "a static cache": {"cache_implementation": "static"},
    "a cache made elsewhere": {"past_key_values": ((),)},
    "other code": {"custom_generate": lambda *a, **k: None},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ways_of_generating_that_go_past_the_release(
    kind: str, model: Any, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError):
        model.generate(**one("bart"), max_new_tokens=2, **REFUSED[kind])
    assert not handle.report().releases


def test_logits_processors_see_no_document(model: Any, private: dpx.DPXAttnConfig) -> None:
    seen: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids)
        return scores

    dpx.protect(model, private)
    model.generate(**one("bart"), max_new_tokens=2, logits_processor=LogitsProcessorList([look]))
    assert all(ids.shape[1] <= 3 for ids in seen)


def test_generate_needs_a_document(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    with pytest.raises(dpx.ContextError, match="document"):
        model.generate(max_new_tokens=2)
    inputs = handle.release(**one("bart")).inputs()
    with pytest.raises(dpx.ConfigError, match="not both"):
        model.generate(input_ids=IDS, **{k: v for k, v in inputs.items() if k != "attention_mask"})


def test_stale_and_foreign_placeholders(private: dpx.DPXAttnConfig) -> None:
    fail_closed.check_foreign(lambda: tiny("bart"), lambda h: h.release(**one("bart")).inputs(), private)


def test_public_and_private_documents_in_one_batch(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    states = handle.release(**one("bart")).inputs()["encoder_outputs"].last_hidden_state
    mixed = torch.cat([states, torch.randn_like(states)])
    with handle.public(), pytest.raises(dpx.ReleaseError, match="batch"):
        model(encoder_outputs=(mixed,), decoder_input_ids=IDS.repeat(2, 1))


def test_changed_weights_are_noticed(model: Any, private: dpx.DPXAttnConfig) -> None:
    release = dpx.protect(model, private).release(**one("bart"))
    fail_closed.check_changed_weights(
        model.model.decoder.layers[0].encoder_attn.k_proj.weight, release.inputs
    )


@pytest.mark.parametrize("name", BUILDERS)
def test_unprotect_restores_bit_for_bit(name: str, private: dpx.DPXAttnConfig) -> None:
    fail_closed.check_restored(tiny(name), lambda m: generate(m, documents(name)), private)


def test_protect_with_other_settings_is_refused(model: Any, private: dpx.DPXAttnConfig) -> None:
    dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError, match="other settings"):
        dpx.protect(model, private.replace(epsilon=1.0))


def test_two_threads_read_their_own_releases(model: Any, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(model, private)
    releases = [handle.release(**one("bart", seed)) for seed in (3, 4)]
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        want = [model(**r.inputs(decoder_input_ids=ids)).logits for r in releases]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            inputs = releases[i].inputs(decoder_input_ids=ids)
            for _ in range(20):
                if not torch.equal(model(**inputs).logits, want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_protected_pipeline(private: dpx.DPXAttnConfig) -> None:
    """What a transformers pipeline gives to generate is released first; the pipeline itself may be protected."""
    moonshine = tiny("moonshine")
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=False)
    pipe = pipeline(
        "automatic-speech-recognition",
        model=moonshine,
        feature_extractor=extractor,
        tokenizer=word_tokenizer(),
    )
    sound = torch.randn(4000).numpy()
    want = pipe(sound)
    handle = dpx.protect(pipe, private.replace(mechanism="none"))
    assert handle.model is moonshine
    assert pipe(sound) == want == pipe(sound)
    assert len(handle.report().releases) == 1
    dpx.unprotect(pipe)
    assert "generate" not in moonshine.__dict__


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_compiled_with_graph_breaks(name: str, private: dpx.DPXAttnConfig) -> None:
    """The gate is never traced, so each call reads its own release, recompiled or not."""
    model = tiny(name)
    handle = dpx.protect(model, private)
    releases = [handle.release(torch.arange(5 + i, 12 + i)) for i in range(4)]
    start = torch.tensor([[2]])
    want = [model(**r.inputs(decoder_input_ids=start)).logits for r in releases]
    torch._dynamo.reset()
    try:
        compiled: Any = torch.compile(model, backend="eager")
        for release, logits in zip(releases, want, strict=True):
            assert torch.equal(compiled(**release.inputs(decoder_input_ids=start)).logits, logits)
        with pytest.raises(dpx.ProtectionLostError):
            compiled(input_ids=torch.arange(5, 12).unsqueeze(0), decoder_input_ids=start)
    finally:
        torch._dynamo.reset()
