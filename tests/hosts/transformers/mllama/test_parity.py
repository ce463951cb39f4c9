"""`mechanism="none"` is the unprotected model: same tokens, scores to 1e-5, for each way of generating."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from ..encoder_decoder.test_parity import TOLERANCE, WAYS, check_same
from .tiny import generate, images, texts, tiny


@pytest.mark.parametrize("way", WAYS)
def test_generate_is_that_of_the_unprotected_model(way: str, exact: dpx.DPXAttnConfig) -> None:
    """A batch of two: one image fills all tiles, the other has a padding tile; left padding; tokens before the image see none."""
    model, options = tiny(), WAYS[way]
    want = generate(model, {**images(), **texts()}, **options)
    handle = dpx.protect(model, exact)
    release = handle.release(**images())
    check_same(generate(model, {**images(), **texts()}, **options), want)
    check_same(generate(model, release.inputs(**texts()), **options), want)
    assert len(handle.report().releases) == len(release) == 2


def test_the_image_matters_to_the_text() -> None:
    """Else parity says nothing."""
    model = tiny()
    one, other = (generate(model, {**images(seed=s), **texts()})[1][0] for s in (3, 9))
    assert float((one - other).abs().max()) > 0.1


@pytest.mark.parametrize("name", ["no mask", "all ones"])
def test_tokens_that_see_everything(name: str, exact: dpx.DPXAttnConfig) -> None:
    """In eager attention, that is: without a mask, sdpa of transformers 5.23 takes these layers for causal ones."""
    model = tiny()
    model.set_attn_implementation("eager")
    inputs = texts(mask=name == "all ones")
    if name == "all ones":
        inputs["cross_attention_mask"] = torch.ones_like(inputs["cross_attention_mask"])
    want = generate(model, {**images(), **inputs})
    dpx.protect(model, exact)
    check_same(generate(model, {**images(), **inputs}), want)


def test_forward_its_steps_and_its_gradient(exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(), texts()
    with torch.no_grad():
        want = model(**images(), **inputs).logits
    handle = dpx.protect(model, exact)
    given = handle.release(**images()).inputs(**inputs)
    got = model(**given)
    assert float((got.logits - want).abs().max()) < TOLERANCE
    got.logits.sum().backward()
    mask, ids = given.pop("attention_mask"), given.pop("input_ids")
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], attention_mask=mask[:, :4], use_cache=True, **given)
        later = model(
            input_ids=ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values, **given
        )
    shown = mask.bool()
    parts = torch.cat([first.logits, later.logits], dim=1)
    # positions are counted without the padding's mask here, so only the element without padding is the same
    assert float((parts[:1] - want[:1]).abs()[shown[:1]].max()) < TOLERANCE


def test_one_image_for_several_texts(exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny(), texts()
    inputs["cross_attention_mask"] = (
        inputs["cross_attention_mask"].amax(-1, keepdim=True).expand(-1, -1, -1, 2)
    )
    twice = {k: v.repeat_interleave(2, dim=0) for k, v in images(1).items()}
    want = generate(model, {**twice, **inputs})
    handle = dpx.protect(model, exact)
    check_same(generate(model, handle.release(**images(1)).inputs(**inputs)), want)
    assert len(handle.report().releases) == 1


def test_projected_rows_are_a_context(exact: dpx.DPXAttnConfig) -> None:
    model = tiny()
    with torch.no_grad():
        body = model.model
        vision = body.vision_model(**images(1)).last_hidden_state
        rows = body.multi_modal_projector(vision).reshape(1, -1, 32)
    want = generate(model, {**images(1), **texts(1)})
    handle = dpx.protect(model, exact)
    for context in (rows, rows[0], {"cross_attention_states": rows}):
        check_same(generate(model, handle.release(context).inputs(**texts(1))), want)
    check_same(generate(model, {"cross_attention_states": rows, **texts(1)}), want)
    assert len(handle.report().releases) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, exact: dpx.DPXAttnConfig) -> None:
    model = tiny().to(dtype)
    with torch.no_grad():
        want = model(**images(), **texts()).logits
        handle = dpx.protect(model, exact)
        got = model(**handle.release(**images()).inputs(**texts())).logits
    assert got.dtype == dtype
    assert float((got - want).abs().max()) < 0.06 * float(want.abs().max())


def test_text_alone_and_public_images_run_as_ever(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    text = texts(mask=False)
    want = generate(model, text), generate(model, {**images(), **texts()})
    handle = dpx.protect(model, private)
    assert torch.equal(generate(model, text, num_beams=2)[0][:, :6], text["input_ids"])
    assert torch.equal(generate(model, text)[1], want[0][1])
    with handle.public():
        assert torch.equal(generate(model, text)[1], want[0][1])
        assert torch.equal(generate(model, {**images(), **texts()})[1], want[1][1])
    assert not handle.report().releases


def test_lora(exact: dpx.DPXAttnConfig) -> None:
    """An adapter on the layers that read images takes part; one that comes later is noticed."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=["cross_attn.k_proj", "cross_attn.v_proj"], init_lora_weights=False
    )
    model = tiny()
    inputs: dict[str, Any] = {**images(), **texts()}
    with dpx.protect(model, exact) as handle:
        release = handle.release(**images())
        model.add_adapter(settings)
        with pytest.raises(dpx.ReleaseError, match="weights"):
            release.inputs(**texts())
    want = generate(model, inputs)
    dpx.protect(model, exact)
    check_same(generate(model, inputs), want)
