"""What the unprotected model's encoder would use is used, or refused by name; nothing is dropped without a word."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from ..decoder_only import tiny as decoders
from .tiny import documents, generate, one, tiny

TYPES = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["bert2gpt2", "bert2bert_wider"])
def test_token_types_act_as_in_the_unprotected_model(name: str, exact: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    inputs = {**one(name), "token_type_ids": TYPES}
    want, without = generate(model, inputs)[1], generate(model, one(name))[1]
    assert not torch.allclose(want, without, atol=1e-2)
    with dpx.protect(model, exact, ledger=dpx.Ledger()) as handle:
        assert torch.allclose(generate(model, inputs)[1], want, atol=1e-4)
        assert torch.allclose(generate(model, handle.release(**inputs).inputs())[1], want, atol=1e-4)
        assert torch.allclose(generate(model, one(name))[1], without, atol=1e-4)


def test_types_under_a_mask(exact: dpx.DPXAttnConfig) -> None:
    model = tiny("bert2gpt2")
    inputs = {**documents("bert2gpt2"), "token_type_ids": TYPES.repeat(2, 1)}
    want = generate(model, inputs)[1]
    with dpx.protect(model, exact, ledger=dpx.Ledger()):
        assert torch.allclose(generate(model, inputs)[1], want, atol=1e-4)


def test_the_same_tokens_with_other_types_are_the_same_document(private: dpx.DPXAttnConfig) -> None:
    with dpx.protect(tiny("bert2gpt2"), private, ledger=dpx.Ledger()) as handle:
        first = handle.release(**one("bert2gpt2"))
        none = torch.zeros_like(TYPES)
        assert handle.release(**one("bert2gpt2"), token_type_ids=none).contexts == first.contexts
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(**one("bert2gpt2"), token_type_ids=TYPES)


@pytest.mark.parametrize(
    "types", [TYPES + 5, -TYPES, TYPES.float(), TYPES[:, :-1], torch.ones(1, 7, 2, dtype=torch.int64)]
)
def test_types_that_do_not_fit_are_refused(types: torch.Tensor, private: dpx.DPXAttnConfig) -> None:
    with dpx.protect(tiny("bert2gpt2"), private, ledger=dpx.Ledger()) as handle:
        with pytest.raises(dpx.DPXAttnError, match="token_type_ids"):
            handle.release(**one("bert2gpt2"), token_type_ids=types)
        assert not handle.ledger.entries()


@pytest.mark.parametrize("name", ["bart", "t5", "bert2gpt2", "vit2gpt2", "whisper", "longt5"])
def test_every_argument_of_an_encoder_is_read_or_refused(name: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    inputs = one(name)
    main = next(iter(inputs.values()))
    known = {"input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values"}
    beside = {
        "attention_mask",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
        "kwargs",
    }
    with dpx.protect(model, private, ledger=dpx.Ledger()) as handle:
        for argument in inspect.signature(model.get_encoder().forward).parameters:
            if argument in known | beside or (argument, name) == ("token_type_ids", "bert2gpt2"):
                continue
            given: Any = torch.ones(main.shape[:2], dtype=torch.int64)
            for call in (handle.release, lambda **g: model.generate(max_new_tokens=2, **g)):
                with pytest.raises(dpx.DPXAttnError):
                    call(**inputs, **{argument: given})
        assert not handle.ledger.entries()
        release = handle.release(**inputs)
        with pytest.raises(dpx.ConfigError):
            release.inputs(token_type_ids=torch.ones(1, 7, dtype=torch.int64))


@pytest.mark.parametrize(
    "beside", [{"attention_mask": [0, 1, 1]}, {"token_type_ids": torch.tensor([[0, 1, 1]])}], ids=str
)
def test_what_a_tokenizer_gives_beside_the_ids_of_a_prefix(
    beside: dict[str, Any], private: dpx.DPXAttnConfig
) -> None:
    with dpx.protect(decoders.tiny("gpt2"), private, ledger=dpx.Ledger()) as handle:
        with pytest.raises(dpx.ContextError, match=next(iter(beside))):
            handle.release({"input_ids": [5, 6, 7], **beside})
        assert not handle.ledger.entries()
        handle.release({"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "token_type_ids": [0, 0, 0]})
