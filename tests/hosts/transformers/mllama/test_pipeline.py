"""As users call it: what a processor gives, a pipeline of transformers, and a protected model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MllamaProcessor, PreTrainedTokenizerFast, pipeline
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import hf_dp_xattn as dpx

from ..encoder_decoder.test_parity import check_same
from .protecting import charges
from .tiny import TILES, VOCABULARY, generate, tiny


@pytest.fixture(scope="module")
def processor() -> Any:
    words = ["<s>", "<pad>", "<d>", "</s>", "<unk>", *(f"w{i}" for i in range(5, VOCABULARY)), "<|image|>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<d>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.image_token, tokenizer.image_token_id = "<|image|>", VOCABULARY
    size = {"height": 8, "width": 8}
    return MllamaProcessor(MllamaImageProcessorPil(size=size, max_image_tiles=TILES), tokenizer)


def picture(width: int, seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (8, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def test_what_a_processor_gives(processor: Any, exact: dpx.DPXAttnConfig) -> None:
    """Two images of different aspect ratios, texts of different lengths, words before the image."""
    inputs = processor(
        text=["w5 <|image|> w7 w8", "w9 w10 <|image|> w11 w12 w13"],
        images=[[picture(16, 1)], [picture(8, 2)]],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["aspect_ratio_mask"].tolist() == [[[1, 1]], [[1, 0]]]
    model = tiny()
    want = generate(model, inputs)
    handle = dpx.protect(model, exact)
    check_same(generate(model, inputs), want)
    image = {n: inputs[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    text = {n: v for n, v in inputs.items() if n not in image}
    check_same(generate(model, handle.release(**image).inputs(**text)), want)
    assert len(handle.report().releases) == 2


def test_a_protected_pipeline(processor: Any, private: dpx.DPXAttnConfig) -> None:
    """What a transformers pipeline gives to generate is released first; the pipeline itself may be protected."""
    model = tiny()
    pipe = pipeline("image-text-to-text", model=model, processor=processor)

    def answer() -> Any:
        return pipe(text="w5 <|image|> w7 w8", images=[picture(16, 1)], max_new_tokens=4)

    want = answer()
    with dpx.protect(pipe, private.replace(mechanism="none")) as handle:
        assert handle.model is model
        assert answer() == want == answer()
        assert len(handle.report().releases) == 1
    handle = dpx.protect(pipe, private)
    assert answer() == answer()
    assert charges(handle) == [1]
    dpx.unprotect(pipe)
    assert answer() == want


def test_a_protected_model_on_disk(processor: Any, private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    model = tiny()
    dpx.protect(model, private)
    model.save_pretrained(tmp_path)
    restored = dpx.from_pretrained(tmp_path)
    handle = dpx.handle_of(restored)
    assert handle is not None and handle.config == private
    release = handle.release(**processor.image_processor(picture(8, 3), return_tensors="pt"))
    ids = torch.tensor([[2, VOCABULARY, 7]])
    assert bool(generate(restored, release.inputs(input_ids=ids))[1].isfinite().any())
