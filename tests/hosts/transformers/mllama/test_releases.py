"""One release per image; the ledger; units; files; what may not be a context; the report."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

import hf_dp_xattn as dpx

from ..encoder_decoder.test_releases import WAYS
from .protecting import anchors_for, charges, protect
from .tiny import PATCHES, generate, images, texts, tiny


@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree", "anchors"])
def test_one_release_whatever_the_expansion(mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = protect(model, private.replace(mechanism=mechanism))
    for options in WAYS:
        generate(model, {**images(), **texts()}, **options)
    release = handle.release(**images())
    generate(model, release.inputs(**texts()), num_beams=2)
    assert charges(handle) == [1, 1]
    assert all(r["spent_epsilon"] <= 8.0 for r in handle.report().releases)


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_padding_tiles_are_no_rows(mechanism: str, private: dpx.DPXAttnConfig) -> None:
    handle = protect(tiny(), private.replace(mechanism=mechanism))
    release = handle.release(**images())
    assert [g.rows for g in release.guarantees] == [2 * PATCHES, PATCHES]
    assert [c.rows for c in release.contexts] == [2 * PATCHES, PATCHES]


def test_the_same_pixels_are_one_context_whatever_their_aspect_ratio(private: dpx.DPXAttnConfig) -> None:
    """The ledger's name is that of the pixels, so a second release of them is refused."""
    handle = dpx.protect(tiny(), private)
    image = images(1)
    handle.release(**image)
    with pytest.raises(dpx.BudgetExceededError):
        handle.release(**{**image, "aspect_ratio_ids": torch.tensor([[3]])})
    assert charges(handle) == [1]


def test_a_second_release_is_refused_beyond_the_budget(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private)
    handle.release(**images(1))
    encoded: list[Any] = []
    model.model.vision_model.register_forward_hook(lambda *a: encoded.append(a))
    with pytest.raises(dpx.BudgetExceededError):
        handle.release(**images(1), fresh=True)
    assert not encoded and charges(handle) == [1]


@pytest.mark.parametrize(
    ("unit", "relation"),
    [
        *((unit, "replace_one") for unit in ("row", "group", "context")),
        *((unit, "add_or_remove_one") for unit in ("row", "group")),
    ],
)
def test_units_and_relations(unit: str, relation: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private.replace(unit=unit, neighboring=relation))
    groups = torch.arange(2).repeat_interleave(PATCHES) if unit == "group" else None
    release = handle.release(**images(1), groups=groups)
    assert release.guarantees[0].unit == unit
    assert bool(generate(model, release.inputs(**texts(1)))[1].isfinite().any())
    if unit == "group":
        with pytest.raises(dpx.ConfigError, match="groups"):
            generate(model, {**images(1), **texts(1)})


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_files(mechanism: str, private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    model = tiny()
    with protect(model, private.replace(mechanism=mechanism)) as handle:
        release = handle.release(**images())
        want = generate(model, release.inputs(**texts()))
        release.save_pretrained(tmp_path)
    loaded = dpx.Release.from_pretrained(tmp_path, host=model)
    got = generate(model, loaded.inputs(**texts()))
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    dpx.unprotect(model)
    with pytest.raises(dpx.ReleaseError, match="protected"):
        loaded.inputs(**texts())


BAD: dict[str, Any] = {
    "text": "a secret",
    "nothing": {},
    "an unknown name": {"input_ids": torch.tensor([[5, 6]])},
    "pixels alone": {"pixel_values": images()["pixel_values"]},
    "pixels and rows": {**images(), "cross_attention_states": torch.zeros(1, 2, 32)},
    "no tensor": {**images(), "pixel_values": [[1.0]]},
    "integer pixels": {**images(), "pixel_values": images()["pixel_values"].long()},
    "NaN": {**images(), "pixel_values": images()["pixel_values"] * torch.nan},
    "another size": {**images(), "pixel_values": torch.zeros(2, 1, 2, 3, 4, 4)},
    "fewer tiles": {**images(), "pixel_values": torch.zeros(2, 1, 1, 3, 8, 8)},
    "several images": {
        "pixel_values": torch.zeros(1, 2, 2, 3, 8, 8),
        "aspect_ratio_ids": torch.tensor([[1, 1]]),
        "aspect_ratio_mask": torch.ones(1, 2, 2, dtype=torch.int64),
    },
    "no image": {**images(), "aspect_ratio_ids": torch.tensor([[2], [0]])},
    "an unknown ratio": {**images(), "aspect_ratio_ids": torch.tensor([[2], [4]])},
    "no tile": {**images(), "aspect_ratio_mask": torch.zeros(2, 1, 2, dtype=torch.int64)},
    "half a tile": {**images(), "aspect_ratio_mask": torch.full((2, 1, 2), 0.5)},
    "a mask of another shape": {**images(), "aspect_ratio_mask": torch.ones(2, 2, dtype=torch.int64)},
    "no rows": torch.zeros(1, 0, 32),
    "rows of other channels": torch.zeros(1, 3, 31),
    "rows of NaN": torch.full((1, 3, 32), torch.nan),
    "rows of too few dimensions": torch.zeros(32),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_contexts_cost_nothing_and_are_not_quoted(kind: str, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny(), private)
    with pytest.raises((dpx.ContextError, dpx.ConfigError)) as caught:
        handle.release(BAD[kind])
    assert "secret" not in str(caught.value)
    assert not handle.report().releases and not handle.ledger.entries()


def test_what_an_image_processor_gives(private: dpx.DPXAttnConfig) -> None:
    """Its output is a context as it is."""
    processor = MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=2)
    picture = Image.new("RGB", (16, 7), (200, 30, 30))
    handle = dpx.protect(tiny(), private)
    release = handle.release(**processor(picture, return_tensors="pt"))
    assert release.contexts[0].rows == 2 * PATCHES


def test_images_do_not_grow_and_have_no_documents(private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny(), private.replace(unit="group"))
    with pytest.raises(dpx.ConfigError, match="grow"):
        handle.release(**images(1), groups=torch.zeros(10, dtype=torch.int64), horizon=2)
    with pytest.raises(dpx.ConfigError, match="integers"):
        handle.release(**images(1), groups="documents")
    assert not handle.ledger.entries()


def test_nothing_private_is_shown_or_copied(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private)
    release = handle.release(**images())
    for thing in (handle, release, model):
        for act in (copy.deepcopy, pickle.dumps):
            with pytest.raises(Exception):  # noqa: B017  pickle has errors of its own
                act(thing)


def test_a_vision_model_that_fails_does_not_quote_the_image(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private)

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if bool(kwargs["pixel_values"].any()):  # not of the black image that is tried before the charge
            raise RuntimeError(f"bad pixels {float(kwargs['pixel_values'].sum())}")

    model.model.vision_model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(dpx.ContextError) as caught:
        handle.release(**images(1))
    assert "pixels" not in str(caught.value) and caught.value.__context__ is None
    assert not handle.report().releases


@pytest.mark.parametrize("unit", ["row", "group"])
def test_the_report_says_what_is_promised_and_what_is_not(unit: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    handle = dpx.protect(model, private.replace(unit=unit))
    groups = torch.arange(10) // 5 if unit == "group" else None
    handle.release(**images(1), groups=groups)
    report = handle.report()
    assert (report.host, report.layers, report.heads) == ("MllamaForConditionalGeneration", 2, 4)
    text = str(report)
    for phrase in ("epsilon", "aspect ratio", "mixes the patches", "whole image", "NOT covered", "the text"):
        assert phrase in text
    assert ("which groups stand together" in text) == (unit == "group")
    assert "document" not in text and "prompt" not in text


def test_anchors_need_a_calibration(private: dpx.DPXAttnConfig) -> None:
    model = tiny()
    config = private.replace(mechanism="anchors")
    with pytest.raises(dpx.ConfigError, match="calibrat"):
        dpx.protect(model, config)
    generate(model, {**images(), **texts()})  # nothing was patched
    handle = dpx.protect(model, config, calibration=anchors_for(model))
    assert bool(generate(model, {**images(), **texts()})[1].isfinite().any())
    assert charges(handle) == [1, 1]
