"""`mechanism="none"` is the unprotected model: same tokens, scores to 1e-5, for each architecture and way of generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import hf_dp_xattn as dpx

from .tiny import BUILDERS, documents, generate, tiny

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams and returns": {"num_beams": 2, "num_return_sequences": 2},
    "sampling and returns": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}
TOLERANCE = 1e-5


def check_same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(a[0], b[0])
    close = (a[1] - b[1]).abs() <= TOLERANCE
    assert bool((close | (a[1] == b[1])).all())  # beams that ended are at -inf in both


@pytest.mark.parametrize("name", BUILDERS)
def test_generate_is_that_of_the_unprotected_model(name: str, exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(name), documents(name)
    before = {way: generate(model, inputs, **options) for way, options in WAYS.items()}
    handle = dpx.protect(model, exact)
    release = handle.release(**inputs)
    for way, options in WAYS.items():
        check_same(generate(model, inputs, **options), before[way])
        check_same(generate(model, release.inputs(), **options), before[way])
    assert len(handle.report().releases) == len(release) == 2  # however often, and over whatever expansion


@pytest.mark.parametrize("name", ["bart", "t5", "bert2gpt2", "t5gemma"])
def test_forward_and_its_gradient(name: str, exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(name), documents(name)
    ids = torch.tensor([[4, 5, 6], [7, 8, 9]])
    want = model(**inputs, decoder_input_ids=ids).logits
    handle = dpx.protect(model, exact)
    got = model(**handle.release(**inputs).inputs(decoder_input_ids=ids)).logits
    assert float((got - want).abs().max()) < TOLERANCE
    got.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_half_precision(name: str, dtype: torch.dtype, exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(name).to(dtype), documents(name)
    ids = torch.tensor([[4, 5], [7, 8]])
    want = model(**inputs, decoder_input_ids=ids).logits
    handle = dpx.protect(model, exact)
    got = model(**handle.release(**inputs).inputs(decoder_input_ids=ids)).logits
    assert got.dtype == dtype
    assert float((got - want).abs().max()) < 0.06 * float(want.abs().max())


def test_left_padding(exact: dpx.DPXAttnConfig) -> None:
    inputs = {k: v.flip(1) for k, v in documents("bart").items()}
    model = tiny("bart")
    before = generate(model, inputs)
    dpx.protect(model, exact)
    check_same(generate(model, inputs), before)


@pytest.mark.parametrize("name", ["bart", "t5", "t5gemma", "bert2bert_wider"])
def test_public_rows_join_under_one_softmax(name: str, exact: dpx.DPXAttnConfig) -> None:
    """A private and a public document side by side are what the decoder makes of both rows together."""
    model, private, public = tiny(name), documents(name, 1, 3), documents(name, 1, 4)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        rows = [model.get_encoder()(input_ids=d["input_ids"])[0] for d in (private, public)]
        joined = BaseModelOutput(torch.cat(rows, dim=1))
        want = model(encoder_outputs=joined, decoder_input_ids=ids).logits
        handle = dpx.protect(model, exact)
        release = handle.release(**private)
        got = model(**release.inputs(input_ids=public["input_ids"], decoder_input_ids=ids)).logits
    assert float((got - want).abs().max()) < TOLERANCE


def test_documents_encoded_apart(exact: dpx.DPXAttnConfig) -> None:
    """Fusion-in-Decoder: one decoder over the rows of all documents."""
    model, inputs = tiny("t5"), documents("t5", 3)
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        whole = model.get_encoder()(**inputs)[0][inputs["attention_mask"] == 1].unsqueeze(0)
        want = model(encoder_outputs=(whole,), decoder_input_ids=ids).logits
        handle = dpx.protect(model, exact.replace(unit="group"))
        release = handle.release(**inputs, groups="documents")
        got = model(**release.inputs(decoder_input_ids=ids)).logits
    [context] = release.contexts
    assert (
        context.rows == handle.host.hidden_length != 15 and context.guarantee.rows is None
    )  # not the documents' 15 rows
    assert float((got - want).abs().max()) < TOLERANCE


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_lora(name: str, exact: dpx.DPXAttnConfig) -> None:
    """An adapter on the cross-attention takes part; one that comes later is noticed."""
    peft = pytest.importorskip("peft")
    names = {
        "bart": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
        "t5": ["EncDecAttention.k", "EncDecAttention.v"],
    }
    settings = peft.LoraConfig(r=2, target_modules=names[name], init_lora_weights=False)
    model, inputs = tiny(name), documents(name)
    plain = generate(model, inputs)
    with dpx.protect(model, exact) as handle:
        release = handle.release(**inputs)
        model.add_adapter(settings)
        with pytest.raises(dpx.ReleaseError, match="weights"):
            release.inputs()
    before = generate(model, inputs)
    assert not torch.allclose(before[1][0], plain[1][0], atol=1e-3)
    dpx.protect(model, exact)
    check_same(generate(model, inputs), before)
