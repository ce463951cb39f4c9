"""What `protect` says to arguments and hosts that are not meant for it, and what one release may serve at once."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import hf_dp_xattn as dpx

from ..hosts_tiny import picture
from .anchor_calibrations import BOTH, protect
from .transformers.decoder_only.tiny import tiny as decoder
from .transformers.encoder_decoder.tiny import generate
from .transformers.encoder_decoder.tiny import tiny as seq2seq

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}


@pytest.mark.parametrize(
    ("name", "value", "way"),
    [
        ("ledger", "ledger.json", "dpx.Ledger"),
        ("budget", 16.0, "dpx.Budget"),
        ("calibration", 8.0, "dpx.calibrate"),
    ],
)
def test_an_argument_of_another_type_is_refused_at_once(
    pipe: Any, private: Any, name: str, value: Any, way: str
) -> None:
    with pytest.raises(dpx.ConfigError, match=way):
        dpx.protect(pipe, private, **{name: value})
    assert dpx.handle_of(pipe) is None


def test_the_same_budget_again_is_the_same_protection(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private, budget=dpx.Budget(20.0, 1e-4))
    assert dpx.protect(pipe, private, budget=dpx.Budget(20.0, 1e-4)) is handle


def wrapped() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(decoder("llama"), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (wrapped, "get_base_model"),
        (lambda: LlamaModel(LlamaConfig(**SMALL)), "ForCausalLM"),
        (lambda: BertModel(BertConfig(**SMALL)), "ForConditionalGeneration"),
        (lambda: torch.nn.Linear(2, 2), "StableDiffusionPipeline"),
    ],
    ids=["peft", "llama without head", "bert", "other"],
)
def test_another_host_is_told_which_ones_are_supported(make: Any, words: str, private: Any) -> None:
    with pytest.raises(dpx.UnsupportedModelError, match=words):
        dpx.protect(make(), private)


def test_a_protected_pipeline_is_not_pickled(pipe: Any, private: Any) -> None:
    with dpx.protect(pipe, private), pytest.raises(dpx.DPXAttnError, match="pickled"):
        pickle.dumps(pipe)


@BOTH
def test_one_release_stands_beside_several_public_prompts(pipe: Any, private: Any) -> None:
    handle = protect(pipe, private)
    release = handle.release("a red circle")
    both = picture(pipe, **release.inputs(prompt=["sixteen", "stars"]))
    assert len(both) == 2 and float((both[0] - both[1]).abs().max()) > 1e-4
    pair = handle.release(["a red circle", "a blue square"])
    with pytest.raises(dpx.ConfigError, match="3 public prompts for 2"):
        pair.inputs(prompt=["a", "b", "c"])


def test_one_release_answers_a_batch_of_questions(private: Any) -> None:
    model = seq2seq("bart")
    with dpx.protect(model, private) as handle:
        release = handle.release(torch.tensor([5, 6, 7, 8]))
        asked = torch.tensor([[2, 9], [2, 10]])
        tokens, scores = generate(model, release.inputs(decoder_input_ids=asked))
        for i in range(2):
            alone = generate(model, release.inputs(decoder_input_ids=asked[i : i + 1]))
            assert torch.equal(tokens[i : i + 1], alone[0])
            torch.testing.assert_close(scores[:, i : i + 1], alone[1], rtol=1e-4, atol=1e-5)


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", epsilon=np.float32(4.0))
    assert type(config.epsilon) is float and config == dpx.DPXAttnConfig(
        mechanism="kernel_sum", unit="row", epsilon=4.0
    )
