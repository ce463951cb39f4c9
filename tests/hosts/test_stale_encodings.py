"""What a host's encoder gave before it was changed is not served for what it gives now; and its token ids stay one secret."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hf_dp_xattn as dpx
from hf_dp_xattn import BudgetExceededError, ReleaseError
from hf_dp_xattn.hosts.encoders import Encoders
from hf_dp_xattn.hosts.weight_changes import stamp

from ..hosts_tiny import CHANNELS, tiny_sd
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from .transformers.mllama.tiny import images
from .transformers.mllama.tiny import tiny as image_tiny

ROOM = dpx.Budget(1000.0, 1e-2)
TEXT = "a red circle"
IDS = torch.arange(4, 12)


def adapt(encoder: Any, targets: tuple[str, ...] = ("q_proj", "v_proj"), scale: float = 0.3) -> None:
    encoder.add_adapter(peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False))
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            if "lora" in name:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * scale)


def nudge(encoder: Any) -> None:
    with torch.no_grad():
        encoder.get_input_embeddings().weight[3] += 0.01


def pipeline_encoder(host: Any) -> Any:
    return host.text_encoder


Host = tuple[Callable[[], Any], Callable[..., Any], Callable[[Any], Any]]
HOSTS: dict[str, Host] = {
    "pipeline": (tiny_sd, lambda h, **o: h.release(TEXT, **o), lambda m: m.text_encoder),
    "phrases": (tiny_sd, lambda h, **o: h.release("a, b", groups="phrases", **o), lambda m: m.text_encoder),
    "bart": (
        lambda: seq2seq_tiny("bart"),
        lambda h, **o: h.release(IDS, **o),
        lambda m: m.get_encoder(),
    ),
    "documents": (
        lambda: seq2seq_tiny("bart"),
        lambda h, **o: h.release(IDS.reshape(2, -1), groups="documents", **o),
        lambda m: m.get_encoder(),
    ),
    "llama": (
        lambda: decoder_tiny("llama"),
        lambda h, **o: h.release(IDS, **o),
        lambda m: m.base_model,
    ),
    "mllama": (
        image_tiny,
        lambda h, **o: h.release(**images(1), **o),
        lambda m: m.base_model.vision_model,
    ),
}

APART = ("phrases", "documents")


def changes(name: str) -> list[Callable[[Any], None]]:
    def weight(encoder: Any) -> None:
        layer = next(m for m in encoder.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            layer.weight[0] += 0.05

    def norm(encoder: Any) -> None:
        layer = next(
            m for m in encoder.modules() if isinstance(m, nn.LayerNorm) or "RMSNorm" in type(m).__name__
        )
        with torch.no_grad():
            layer.weight[0] += 0.05

    return [weight, norm] if name == "mllama" else [weight, norm, nudge]


@pytest.mark.parametrize("name", HOSTS)
def test_a_changed_encoder_is_asked_anew_and_charged(name: str, private: dpx.DPXAttnConfig) -> None:
    make, release, encoder_of = HOSTS[name]
    unit = "group" if name in APART else "row"
    config = private.replace(unit=unit)
    for change in changes(name):
        model = make()
        ledger = dpx.Ledger()
        handle = dpx.protect(model, config, ledger=ledger, budget=ROOM)
        first = release(handle)
        assert release(handle).contexts == first.contexts
        kept = copy.deepcopy(encoder_of(model).state_dict())
        change(encoder_of(model))
        second = release(handle)
        assert second.contexts != first.contexts
        assert max(c.number_of_releases for c in ledger.entries()) == 2  # one secret
        encoder_of(model).load_state_dict(kept)
        assert release(handle).contexts == first.contexts  # it is what it was: found again
        assert max(c.number_of_releases for c in ledger.entries()) == 2
        handle.unprotect()


@pytest.mark.parametrize("name", HOSTS)
def test_beyond_the_budget_the_error_says_why(name: str, private: dpx.DPXAttnConfig) -> None:
    make, release, encoder_of = HOSTS[name]
    model = make()
    handle = dpx.protect(model, private.replace(unit="group" if name in APART else "row"))
    release(handle)
    before = handle.ledger.entries()
    changes(name)[0](encoder_of(model))
    # a prefix's keys and values are of the weights too, and that is told first
    told = "the weights of|state of the encoder" if name == "llama" else "another state of the encoder"
    with pytest.raises(BudgetExceededError, match=told) as caught:
        release(handle)
    assert handle.ledger.entries() == before
    assert "Use the release that exists" not in str(caught.value)


def test_an_adapter_and_its_switch(private: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private, budget=ROOM)
    plain = handle.release(TEXT).contexts
    adapt(pipe.text_encoder)
    adapted = handle.release(TEXT).contexts
    pipe.text_encoder.disable_adapters()
    assert handle.release(TEXT).contexts == plain
    pipe.text_encoder.enable_adapters()
    assert handle.release(TEXT).contexts == adapted
    assert plain != adapted


def test_pictures_are_of_the_encoder_as_it_is(exact: dpx.DPXAttnConfig) -> None:
    def picture(pipe: Any, prompt: str = TEXT) -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        out: torch.Tensor = pipe(
            prompt, num_inference_steps=2, output_type="latent", generator=generator
        ).images
        return out

    one, two = (torch.randn(2, CHANNELS, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def drawn(pipe: Any) -> list[torch.Tensor]:
        found = [picture(pipe)]
        pipe.load_textual_inversion(one, token="<toy>")
        found += [picture(pipe, "a <toy> b"), picture(pipe)]
        pipe.unload_textual_inversion()
        pipe.load_textual_inversion(two, token="<toy>")
        found += [picture(pipe, "a <toy> b")]
        adapt(pipe.text_encoder)
        return [*found, picture(pipe)]

    plain, pipe = drawn(tiny_sd()), tiny_sd()
    dpx.protect(pipe, exact)
    for found, wanted in zip(drawn(pipe), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain[1], plain[3], atol=1e-3)


def test_a_new_token_leaves_earlier_prompts_alone(private: dpx.DPXAttnConfig) -> None:
    """Which releases are stale depends on the weights alone, never on whether a prompt holds the token."""
    pipe = tiny_sd()
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))  # as trained encoders have it
    handle = dpx.protect(pipe, private, budget=ROOM)
    before = handle.release(TEXT).contexts
    pipe.load_textual_inversion(torch.ones(1, CHANNELS), token="<toy>")
    assert handle.release(TEXT).contexts == before
    with_token, other = handle.release("a <toy> b").contexts, handle.release("zebra").contexts
    pipe.unload_textual_inversion()
    pipe.load_textual_inversion(torch.ones(1, CHANNELS) * 2, token="<toy>")
    assert handle.release(TEXT).contexts == before
    assert handle.release("a <toy> b").contexts != with_token
    assert handle.release("zebra").contexts != other  # made when the table held the other embedding


def test_a_second_pipeline_with_another_text_encoder(private: dpx.DPXAttnConfig) -> None:
    pipe, other = tiny_sd(), tiny_sd()
    nudge(other.text_encoder)
    other.unet = pipe.unet
    handle = dpx.protect(pipe, private)
    dpx.protect(other, private)
    pipe(TEXT, num_inference_steps=1, output_type="latent")
    with pytest.raises(BudgetExceededError, match="another pipeline's encoder"):
        other(TEXT, num_inference_steps=1, output_type="latent")
    assert len(handle.report().releases) == 1
    third = tiny_sd()  # an equal one, loaded for itself: the same rows
    third.unet = pipe.unet
    dpx.protect(third, private)
    third(TEXT, num_inference_steps=1, output_type="latent")
    assert len(handle.report().releases) == 1


def test_a_cast_is_no_other_encoder(private: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    first = handle.release(TEXT).contexts
    pipe.to(torch.float16)
    assert handle.release(TEXT).contexts == first
    nudge(pipe.text_encoder)
    with pytest.raises(BudgetExceededError):
        handle.release(TEXT)


def test_a_table_of_positions_that_grew_is_no_other_state(private: dpx.DPXAttnConfig) -> None:
    """How long another private document is must not decide whether this one's release is found."""
    model = seq2seq_tiny("m2m100")
    handle = dpx.protect(model, private)
    first = handle.release(IDS).contexts[0].tag
    sizes = [b.shape for b in model.get_encoder().buffers()]
    handle.release(torch.randint(5, 30, (400,)))
    assert sizes != [b.shape for b in model.get_encoder().buffers()]
    with torch.no_grad():
        next(model.get_encoder().parameters()).add_(0.0)  # so that the state is read anew
    assert handle.release(IDS).contexts[0].tag == first


def test_a_growing_release_is_of_one_encoder(private: dpx.DPXAttnConfig) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private)
    release = handle.release(TEXT, horizon=4)
    release.append("zebra")
    before = handle.ledger.entries()
    nudge(pipe.text_encoder)
    with pytest.raises(ReleaseError, match="Nothing was spent"):
        release.append("quartz")
    assert handle.ledger.entries() == before


def test_a_stamp_is_not_fooled_by_an_address_that_is_used_again() -> None:
    """A weight may be freed and the next one lie where it lay, under the same id."""
    module = nn.Embedding(4, 3)
    before = stamp([module])
    for _ in range(4):
        del module.weight
        gc.collect()
        module.weight = nn.Parameter(torch.zeros(4, 3))
        assert stamp([module]) != before
        before = stamp([module])
        assert stamp([module]) == before


def test_states_are_read_only_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_dp_xattn.hosts import encoders

    read = []
    plain = encoders._read
    monkeypatch.setattr(encoders, "_read", lambda e: read.append(1) or plain(e))
    encoder, known = tiny_sd().text_encoder, Encoders()
    assert {known.states((encoder,)) for _ in range(3)} == {(b"0",)} and len(read) == 1
    nudge(encoder)
    assert known.states((encoder,)) == (b"1",) and len(read) == 2
