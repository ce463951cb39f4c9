"""`calibrate` for encoder-decoder models: public documents in, calibrations of both kinds out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.calibration.anchors.anchors_fit import AnchorSettings, candidates
from hf_dp_xattn.calibration.anchors.gather_documents import gather_documents
from hf_dp_xattn.calibration.anchors.objective import LayerProbe
from hf_dp_xattn.hosts.transformers.encoder_decoder.cross_probing import find_layers
from hf_dp_xattn.hosts.transformers.encoder_decoder.document_encoder import EncoderSide
from hf_dp_xattn.hosts.transformers.encoder_decoder.document_reader import DocumentReader, choose

from .tiny import VOCABULARY, documents, generate, tiny

EPSILONS = (8.0,)


def public_ids(count: int = 80) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(1))


def calibrate(model: Any, config: dpx.DPXAttnConfig, public: Any = None, **options: Any) -> Any:
    public = public_ids() if public is None else public
    options = {"anchors": 16, "steps": 6, "rank": 8, "query_prompts": 4, "query_steps": 4, **options}
    return dpx.calibrate(model, public, config, epsilons=EPSILONS, progress=False, **options)


@pytest.mark.parametrize(("name", "mechanism"), [("t5gemma", "kernel_sum"), ("t5", "anchors")])
def test_from_public_documents_to_a_text(name: str, mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    config = private.replace(mechanism=mechanism, projection_dim=16)
    random = torch.get_rng_state()
    calibration = calibrate(model, config, releases=("sum", "histogram"))
    assert torch.equal(random, torch.get_rng_state())
    handle = dpx.protect(model, config, calibration=calibration, allow_useless=True)
    assert bool(generate(model, documents(name))[1].isfinite().any())
    assert all(r["guarantee"]["calibrated"] for r in handle.report().releases)


@pytest.mark.parametrize("name", ["bart", "t5", "t5gemma"])
def test_the_gain_of_a_head_is_that_of_the_output_projection(name: str) -> None:
    for layer in find_layers(tiny(name)).values():
        module: Any = layer.module
        linear = next(getattr(module, n) for n in ("out_proj", "o_proj", "o") if hasattr(module, n))
        want = linear.weight.double().square().sum(0).reshape(layer.heads, -1).mean(1)
        assert torch.allclose(layer.output_gain(), want, rtol=0.5)


def test_what_cannot_be_calibrated(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    padded = {name: tensor.repeat(8, 1) for name, tensor in documents("bart").items()}
    with pytest.raises(dpx.ConfigError, match="padding"):
        calibrate(model, private, padded)
    dpx.protect(model, private)
    with pytest.raises(dpx.ConfigError, match="before"):
        calibrate(model, private)


def documents_of(
    seed: int, count: int = 12, longest: int = 7, repeats: bool = True
) -> dict[str, torch.Tensor]:
    """A public context: documents of unequal length, some of them the same."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (count, longest), generator=generator)
    mask = torch.arange(longest) < torch.randint(3, longest + 1, (count, 1), generator=generator)
    if repeats:
        ids[1], mask[1] = ids[0], mask[0]
    return {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}


def public_documents(contexts: int = 70) -> list[dict[str, torch.Tensor]]:
    return [documents_of(i) for i in range(contexts)]


@pytest.mark.parametrize(("name", "mechanism"), [("bart", "kernel_sum"), ("t5", "anchors")])
def test_documents_are_released_with_a_calibration_for_groups(
    name: str, mechanism: str, private: dpx.DPXAttnConfig
) -> None:
    model = tiny(name)
    config = private.replace(mechanism=mechanism, unit="group", projection_dim=16)
    random = torch.get_rng_state()
    public = public_documents(70 if mechanism == "anchors" else 10)
    calibration = calibrate(model, config, public, questions=[[7, 8], [9]])
    assert torch.equal(random, torch.get_rng_state())
    assert calibration.units == 12
    handle = dpx.protect(model, config, calibration=calibration, allow_useless=True)
    release = handle.release(**documents_of(999), groups="documents")
    scores = generate(model, release.inputs())[1]
    assert bool(scores.isfinite().any()) and not bool(scores.isnan().any())
    (found,) = handle.report().releases
    assert found["guarantee"]["unit"] == "group" and found["guarantee"]["units"] == 12


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_each_document_is_read_by_itself_and_attention_is_over_all_of_its_rows(name: str) -> None:
    model = tiny(name).eval()
    layers = find_layers(model)
    contexts = [documents_of(i, count=6 + i) for i in range(3)]
    reader = DocumentReader(model, 64)
    gen = torch.Generator().manual_seed(0)
    probes = []
    for layer in layers.values():
        queries = torch.randn(layer.heads, 5, layer.inner_dim // layer.heads, generator=gen)
        probes.append(LayerProbe(layer.project, layer.scale, queries, torch.ones(layer.heads)))
    with torch.no_grad():
        public, _ = gather_documents(map(reader.read, contexts), 3, probes, seed=0)
        assert public.units.shape[:2] == (3, 8) and public.mask.sum(1).tolist() == [6, 7, 8]
        assert public.outputs is not None
        for i, context in enumerate(contexts):
            rows = [
                model.get_encoder()(input_ids=ids[m.bool()].unsqueeze(0))[0][0]
                for ids, m in zip(context["input_ids"], context["attention_mask"], strict=True)
            ]
            means = torch.stack([r.mean(0) for r in rows])
            # half precision keeps 11 bits; the rows of these models lie within a few units
            assert torch.allclose(public.units[i, : len(rows)].float(), means, atol=0.01)
            for probe, outputs in zip(probes, public.outputs, strict=True):
                exact = probe.attend(torch.cat(rows).unsqueeze(0), probe.queries)[0]
                assert torch.allclose(outputs[i].float(), exact, atol=0.02)


def test_rows_of_the_encoder_and_token_ids_give_the_same_units() -> None:
    model = tiny("t5").eval()
    context = documents_of(5)
    with torch.no_grad():
        states = model.get_encoder()(**context)[0]
        by_ids = DocumentReader(model, 64).read(context)
        by_rows = DocumentReader(model, 64).read(
            {"encoder_outputs": states, "attention_mask": context["attention_mask"]}
        )
    assert all(torch.allclose(a.float(), b.float(), atol=0.01) for a, b in zip(by_ids, by_rows, strict=True))


def test_only_so_many_contexts_as_the_memory_holds_and_no_answer_for_each_of_many_documents() -> None:
    public = public_documents(200)
    chosen = choose(tiny("t5"), public, width=2**19, memory_mb=100, seed=0)
    assert len(chosen) == 99 and all(any(c is p for p in public) for c in chosen)
    config = dpx.DPXAttnConfig(mechanism="anchors", unit="group")

    def releases(asked: tuple[str, ...], documents: int) -> tuple[str, ...]:
        return candidates(config, AnchorSettings(releases=asked), documents)

    assert releases(("sum", "response"), 64) == ("sum",)
    assert releases(("sum", "response"), 63) == ("sum", "response")
    assert releases(("response",), 64) == ("response",)


@pytest.mark.parametrize(
    ("public", "options", "match"),
    [
        ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, {}, "at least 64"),
        ([torch.ones(7, dtype=torch.int64)] * 70, {}, "batch of documents"),
        (
            [{"input_ids": torch.full((2, 3), 9), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}]
            * 70,
            {},
            "mask",
        ),
        (public_documents(), {"questions": [[]]}, "questions"),
        (public_documents(), {"questions": [[0.5]]}, "questions"),
        (public_documents(9), {}, "at least 64"),
    ],
    ids=["one context", "one document", "empty document", "empty question", "no ids", "too few"],
)
def test_bad_public_documents(
    public: Any, options: dict[str, Any], match: str, private: dpx.DPXAttnConfig
) -> None:
    config = private.replace(mechanism="anchors", unit="group")
    with pytest.raises(dpx.ConfigError, match=match):
        calibrate(tiny("t5"), config, public, **options)


def test_contexts_of_kernel_sum_have_as_many_documents_as_each_other(private: dpx.DPXAttnConfig) -> None:
    public = [documents_of(i, count=6 + i % 2) for i in range(10)]
    with pytest.raises(dpx.ConfigError, match="as many groups"):
        calibrate(tiny("t5"), private.replace(unit="group"), public)


@pytest.mark.parametrize("kind", ["input_ids", "inputs_embeds"])
def test_every_public_document_is_encoded_once(
    kind: str, private: dpx.DPXAttnConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 documents a context, one of them twice; rows that no token ids name cannot be known to be the same."""
    model = tiny("t5")
    seen = []
    encode_batch = EncoderSide.encode_batch

    def recorded(self: EncoderSide, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(len(inputs[kind]))
        return encode_batch(self, inputs)

    monkeypatch.setattr(EncoderSide, "encode_batch", recorded)
    public = public_documents(66)
    if kind == "inputs_embeds":
        table = model.get_input_embeddings()
        public = [{kind: table(c.pop("input_ids")).detach(), **c} for c in public]
    config = private.replace(mechanism="anchors", unit="group")
    calibrate(model, config, public, releases=("sum",), steps=2)
    assert sum(seen) == 66 * (11 if kind == "input_ids" else 12)
