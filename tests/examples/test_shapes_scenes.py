"""The shapes example: split, captions, renderer, reader and the size of the shipped pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from shapes import scenes as sc  # noqa: E402
from shapes.parts import CONTEXT, build_tokenizer, build_unet, tokenize  # noqa: E402
from shapes.reader import EMPTY, describe, load_reader, read, score  # noqa: E402


@pytest.fixture(scope="module")
def heldout() -> list[sc.Example]:
    return sc.heldout_examples(500, seed=11)


def test_vocabulary_is_large_enough():
    assert len(sc.SHAPES) >= 5 and len(sc.COLOURS) >= 8 and len(sc.BACKGROUNDS) >= 8
    assert len(sc.SIZES) == 2 and len(sc.PLACES) == 5


def test_split_is_disjoint_and_about_an_eighth(heldout):
    triples = sc.heldout_triples()
    assert len(triples) / (8 * 5 * 5) == pytest.approx(0.125)
    train = sc.train_examples(3000, seed=11)
    assert not {o.triple for e in train for o in e.scene.objects} & triples
    assert {o.triple for e in heldout for o in e.scene.objects} == triples
    seen = {o.triple for e in train for o in e.scene.objects}
    assert len(seen) == 200 - len(triples)  # training covers all the rest


def test_scenes_are_well_formed(heldout):
    for example in [*heldout, *sc.train_examples(500, seed=3)]:
        objects = example.scene.objects
        assert 1 <= len(objects) <= 2
        assert len({o.place for o in objects}) == len(objects)
        assert all(o.colour != example.scene.background for o in objects)


def test_captions_name_every_attribute(heldout):
    assert len({e.caption for e in heldout}) > 450  # many phrasings and combinations
    for example in heldout:
        assert sc.parse_caption(example.caption) == example.scene
        assert sc.parse_caption(sc.canonical_caption(example.scene)) == example.scene


def test_canonical_caption_reads_as_documented():
    scene = sc.Scene(
        "green",
        (sc.SceneObject("circle", "red", "large", "left"), sc.SceneObject("star", "blue", "small", "right")),
    )
    assert sc.canonical_caption(scene) == (
        "a large red circle on the left and a small blue star on the right on a green background"
    )


def test_parse_rejects_other_text():
    with pytest.raises(ValueError, match="grammar"):
        sc.parse_caption("a cat on a green background")


def test_seeds_decide_everything():
    assert sc.train_captions(20, 5) == sc.train_captions(20, 5)
    assert sc.train_captions(20, 5) != sc.train_captions(20, 6)
    assert sc.heldout_captions(20, 5) != sc.train_captions(20, 5)
    scenes = [e.scene for e in sc.train_examples(20, 5)]
    assert np.array_equal(sc.render(scenes, 1), sc.render(scenes, 1))
    assert not np.array_equal(sc.render(scenes, 1), sc.render(scenes, 2))


def test_renderer_paints_object_and_background():
    scene = sc.Scene("green", (sc.SceneObject("circle", "red", "large", "left"),))
    image = sc.render([scene])[0].astype(int)
    assert image.shape == (32, 32, 3)
    assert np.abs(image[16, 6] - sc.COLOURS["red"]).max() <= 7
    assert np.abs(image[16, 28] - sc.BACKGROUNDS["green"]).max() <= 5
    small = sc.Scene("green", (sc.SceneObject("circle", "red", "small", "left"),))
    reds = [int((im[:, :, 0].astype(int) > 150).sum()) for im in sc.render([scene, small])]
    assert reds[0] > 1.8 * reds[1]


def test_every_caption_word_is_one_token():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(w)["input_ids"]) == 3 for w in sc.caption_words())
    ids = tokenize(tokenizer, sc.train_captions(4, 0))
    assert ids.shape == (4, CONTEXT) and (ids[:, -1] == tokenizer.eos_token_id).all()


def test_unet_has_several_multi_head_cross_attention_layers():
    with torch.device("meta"):
        unet = build_unet()
    layers = [m for n, m in unet.named_modules() if n.endswith("attn2")]
    assert len(layers) >= 4 and all(m.heads >= 2 for m in layers)


def test_shipped_pipeline_is_small_and_half_precision():
    folder = EXAMPLES / "shapes" / "pipeline"
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 20e6
    weights = [f for f in files if f.suffix == ".safetensors"]
    assert len(weights) == 3
    for file in weights:
        with file.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        assert {v["dtype"] for k, v in header.items() if k != "__metadata__"} == {"F16"}


def test_reader_is_right_on_rendered_heldout_scenes(heldout):
    scenes = [e.scene for e in heldout]
    images = sc.render(scenes, seed=12)
    reader = load_reader()
    result = score(images, scenes, reader)
    assert result.accuracy >= 0.99 and min(result.by_kind.values()) >= 0.99
    assert result.extra <= 0.01
    found = describe(images, reader)
    assert np.mean([set(f.objects) == set(s.objects) for f, s in zip(found, scenes, strict=True)]) > 0.97


def test_score_counts_what_is_missing():
    full = sc.Scene(
        "black",
        (
            sc.SceneObject("circle", "red", "large", "left"),
            sc.SceneObject("square", "yellow", "large", "right"),
        ),
    )
    half = sc.Scene("black", full.objects[:1])
    images = sc.render([half])
    reader = load_reader()
    assert (read(images, reader)[0, 0:15:3] != EMPTY).sum() == 1
    assert score(images, [half], reader).accuracy == 1.0
    missing = score(images, [full], reader)
    assert missing.accuracy == pytest.approx(5 / 9)
    assert missing.by_kind["place"] == 0.5 and missing.exact == 0.0
    assert score(sc.render([full]), [half], reader).extra == 1.0


def test_captions_leave_most_of_the_rows_to_padding() -> None:
    """The README says so: at most 31 tokens of 77, BOS and end included."""
    tokenizer = build_tokenizer()
    captions = (*sc.train_captions(3000, 5), *sc.heldout_captions(1000, 5))
    lengths = [len(tokenizer(c).input_ids) for c in captions]
    assert max(lengths) <= 31
