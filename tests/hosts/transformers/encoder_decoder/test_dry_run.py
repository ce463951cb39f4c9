"""What fails whatever a document holds fails before it is charged; and what a dry run leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.transformers.encoder_decoder import cross_probing

from .tiny import documents, generate, one, tiny


class Counting:
    """A logits processor and stopping criterion that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Any, scores: Any) -> Any:
        self.calls += 1
        return scores


class Tokens:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        pass


WRONG: dict[str, dict[str, Any]] = {
    "an unknown name": {"nonsense": 3},
    "no beams": {"num_beams": 0},
    "no tokens": {"max_new_tokens": 0},
    "a text for a number": {"max_new_tokens": "a"},
    "decoder ids of a wrong rank": {"decoder_input_ids": torch.tensor([[[2]]])},
    "decoder ids that are no integers": {"decoder_input_ids": torch.tensor([[2.5]])},
    "decoder ids out of range": {"decoder_input_ids": torch.tensor([[2, 999]])},
    "negative decoder ids": {"decoder_input_ids": torch.tensor([[2, -1]])},
    "another batch of decoder ids": {"decoder_input_ids": torch.tensor([[2], [2], [2]])},
    "a start token out of range": {"decoder_start_token_id": 999},
    "a processor that is none": {"logits_processor": [3]},
    "processors that are no list": {"logits_processor": 3},
    "a processor without arguments": {"logits_processor": [lambda: None]},
    "a criterion that is none": {"stopping_criteria": [3]},
    "a function that is none": {"prefix_allowed_tokens_fn": 3},
    "a streamer that is none": {"streamer": 3},
    "words out of range": {"bad_words_ids": [[999]]},
    "biases out of range": {"sequence_bias": {(999,): 1.0}},
    "a forced token out of range": {"forced_bos_token_id": 999},
    "a last token out of range": {"forced_eos_token_id": 999},
    "a penalty that is no number": {"exponential_decay_length_penalty": (3, "a")},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_bad_arguments_of_generate_cost_nothing(name: str, wrong: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = dpx.protect(model, private)
    with pytest.raises(dpx.DPXAttnError):
        model.generate(**one(name), **{"max_new_tokens": 3, **WRONG[wrong]})
    assert not handle.ledger.entries() and not handle.report().releases
    generate(model, one(name))
    assert len(handle.report().releases) == 1


@pytest.mark.parametrize("name", ["bart", "whisper", "vit2gpt2"])
def test_a_dry_run_leaves_no_mark(name: str, private: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(name), one(name)
    handle = dpx.protect(model, private)
    counting, streamer = Counting(), Tokens()
    options: dict[str, Any] = {
        "do_sample": True,
        "logits_processor": tf.LogitsProcessorList([counting]),
        "streamer": streamer,
    }
    if name == "whisper":
        del options["streamer"]
    first, scores = generate(model, inputs, **options)
    calls, seen = counting.calls, len(streamer.seen)
    again, same = generate(model, inputs, **options)  # released already: no dry run
    assert torch.equal(first, again) and torch.equal(scores, same)
    assert counting.calls == 2 * calls and len(streamer.seen) == 2 * seen
    assert len(handle.report().releases) == 1


def test_a_dry_run_is_of_zeros(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    dpx.protect(model, private)
    seen: list[Any] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["encoder_hidden_states"].detach().clone())

    model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    generate(model, one("bart"))
    assert len(seen) > 2 and not seen[0].any() and not seen[1].any()
    assert all(bool(states.isnan().any()) for states in seen[2:])


@pytest.mark.parametrize(
    ("name", "given", "wanted"),
    [
        ("whisper", {"input_ids": torch.tensor([[5, 6]])}, "input_features"),
        ("moonshine", {"input_ids": torch.tensor([[5, 6]])}, "input_values"),
        ("vit2gpt2", {"input_ids": torch.tensor([[5, 6]])}, "pixel_values"),
        ("bart", {"input_features": torch.zeros(1, 4, 16)}, "input_ids"),
        ("t5", {"pixel_values": torch.zeros(1, 3, 8, 8)}, "input_ids"),
    ],
)
def test_another_kind_of_input_is_named(
    name: str, given: dict[str, Any], wanted: str, private: dpx.DPXAttnConfig
) -> None:
    handle = dpx.protect(tiny(name), private)
    with pytest.raises(dpx.ContextError, match=f"encoder reads .*{wanted}"):
        handle.release(**given)
    assert not handle.ledger.entries()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("whisper", {"input_features": torch.zeros(1, 9, 16)}),
        ("whisper", {"input_features": torch.zeros(4, 16)}),
        ("speech2text", {"input_features": torch.zeros(1, 24, 5)}),
        ("vit2gpt2", {"pixel_values": torch.zeros(1, 3, 7, 7)}),
        ("vit2gpt2", {"pixel_values": torch.zeros(3, 8, 8)}),
        ("bart", {"inputs_embeds": torch.zeros(1, 4, 5)}),
    ],
)
def test_wrong_shapes_cost_nothing(name: str, given: dict[str, Any], private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = dpx.protect(model, private)
    for use in (handle.release, lambda **k: model.generate(**k, max_new_tokens=2)):
        with pytest.raises(dpx.ContextError):
            use(**given)
    assert not handle.ledger.entries()


def test_a_model_of_layouts_is_refused(private: dpx.DPXAttnConfig) -> None:
    """Its encoder needs boxes beside the ids, which no release takes."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = tf.UdopConfig(vocab_size=60, image_size=8, patch_size=4, max_2d_position_embeddings=16, **sizes)
    model = tf.UdopForConditionalGeneration(config).eval()
    with pytest.raises(dpx.UnsupportedModelError, match="token ids alone"):
        dpx.protect(model, private)
    assert dpx.handle_of(model) is None


LONG: dict[str, dict[str, Any]] = {
    "longt5": {},
    "longt5_global": {"encoder_attention_type": "transient-global", "global_block_size": 4},
    "pegasus_x": {},
}


def _long(name: str) -> Any:
    sizes = {
        "vocab_size": 60,
        "d_model": 16,
        "decoder_start_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 3,
    }
    torch.manual_seed(0)
    if name.startswith("longt5"):
        t5 = {
            "d_kv": 8,
            "d_ff": 16,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "local_radius": 4,
        }
        return tf.LongT5ForConditionalGeneration(tf.LongT5Config(**sizes, **t5, **LONG[name])).eval()
    bart = {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 512,
    }
    if name == "pegasus_x":
        config = tf.PegasusXConfig(**sizes, **bart, block_size=8, num_global_tokens=2)
        return tf.PegasusXForConditionalGeneration(config).eval()
    big = {"block_size": 4, "num_random_blocks": 1, "attention_type": "block_sparse"}
    return tf.BigBirdPegasusForConditionalGeneration(tf.BigBirdPegasusConfig(**sizes, **bart, **big)).eval()


@pytest.mark.parametrize("name", LONG)
def test_encoders_of_long_documents_are_as_they_were(name: str, exact: dpx.DPXAttnConfig) -> None:
    model = _long(name)
    ids = torch.randint(5, 60, (1, 330), generator=torch.Generator().manual_seed(1))
    want = generate(model, {"input_ids": ids})
    dpx.protect(model, exact)
    got = generate(model, {"input_ids": ids})
    assert torch.equal(got[0], want[0])
    assert float((got[1] - want[1]).abs().nan_to_num(0.0, 0.0).max()) < 1e-4


def test_an_encoder_that_texts_change_is_refused(private: dpx.DPXAttnConfig) -> None:
    """A short text switches it to full attention for all that come after."""
    model = _long("bigbird_pegasus")
    ids = torch.randint(5, 60, (1, 330), generator=torch.Generator().manual_seed(1))
    want = generate(model, {"input_ids": ids})
    with pytest.raises(dpx.UnsupportedModelError, match="changed by the texts"):
        dpx.protect(model, private)
    got = generate(model, {"input_ids": ids})
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def _dynamic() -> Any:
    """Its rotation is that of the longest text so far."""
    torch.manual_seed(0)
    rotation = {"rope_type": "dynamic", "factor": 16.0, "rope_theta": 1e4}
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    heads = {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": None,
    }
    part = tf.T5GemmaModuleConfig(
        **sizes,
        **heads,
        sliding_window=512,
        pad_token_id=0,
        max_position_embeddings=32,
        rope_parameters=rotation,
    )
    model = tf.T5GemmaForConditionalGeneration(
        tf.T5GemmaConfig(
            encoder=part, decoder=copy.deepcopy(part), vocab_size=64, pad_token_id=0, bos_token_id=2
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.get_encoder().named_parameters():
            if "_proj" in name:
                weight.mul_(30.0)  # so that attention is not flat
    return model


@pytest.mark.parametrize("by", ["name", "rows"])
def test_a_rotation_of_the_longest_text_is_refused(
    by: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document's rows, and those of a public one, would tell how long an earlier private one was."""
    if by == "rows":
        monkeypatch.setattr(cross_probing, "rotations", lambda config: set())
    with pytest.raises(dpx.UnsupportedModelError, match="changed by the texts"):
        dpx.protect(_dynamic(), private)


@pytest.mark.parametrize("pads", [0, 1], ids=lambda n: f"pads={n}")
def test_positions_behind_the_padding_s_own(pads: int, private: dpx.DPXAttnConfig) -> None:
    """RoBERTa counts from the padding's id, and only what is no padding: two documents of one length fare alike."""
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = tf.RobertaConfig(**small, intermediate_size=32, max_position_embeddings=66, pad_token_id=0)
    decoder = tf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    handle = dpx.protect(tf.EncoderDecoderModel(config=config).eval(), private, ledger=dpx.Ledger())
    document = torch.arange(66) % 50 + 5
    document[60 : 60 + pads] = 0
    with pytest.raises(dpx.ContextError, match=r"takes \(65\); nothing was spent"):
        handle.release(document)
    assert not handle.ledger.entries()
    handle.release(document[:65])


def test_cross_attention_with_a_window_is_found(private: dpx.DPXAttnConfig) -> None:
    """Which no configuration names, and which shows from a hundred rows on."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.models.bart.modeling_bart import eager_attention_forward

    def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        return eager_attention_forward(module, query, key[:, :, -100:], value[:, :, -100:], None, **kwargs)

    AttentionInterface.register("last_hundred", forward)
    AttentionMaskInterface.register("last_hundred", sdpa_mask)
    model = tiny("bart")
    for layer in model.model.decoder.layers:
        layer.encoder_attn.config = type(model.config).from_dict(model.config.to_dict())
        layer.encoder_attn.config._attn_implementation = "last_hundred"
    with pytest.raises(dpx.UnsupportedModelError, match="not a softmax"):
        dpx.protect(model, private)


def test_right_arguments_are_taken(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    handle = dpx.protect(model, private)
    model.generate(
        **documents("bart"),
        decoder_input_ids=torch.tensor([[2, 7], [2, 8]]),
        num_beams=2,
        max_new_tokens=2,
        prefix_allowed_tokens_fn=lambda batch, ids: list(range(60)),
        stopping_criteria=[lambda ids, scores, **kwargs: torch.zeros(len(ids), dtype=torch.bool)],
    )
    assert len(handle.report().releases) == 2
