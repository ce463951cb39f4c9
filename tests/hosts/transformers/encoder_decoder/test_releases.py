"""One release per context; the ledger; units; files; growth; what may not be a context."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import documents, generate, one, tiny

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
)


def charges(handle: Any) -> list[int]:
    return [r["charges"] for r in handle.report().releases]


@pytest.mark.parametrize("mechanism", ["kernel_sum", "dptree", "anchors"])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_one_release_whatever_the_expansion(name: str, mechanism: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny(name)
    handle = protect(model, private.replace(mechanism=mechanism))
    for options in WAYS:
        generate(model, documents(name), **options)
    release = handle.release(**documents(name))
    generate(model, release.inputs(), num_beams=2)
    assert charges(handle) == [1, 1]
    assert all(r["spent_epsilon"] <= 8.0 for r in handle.report().releases)


def test_one_name_however_it_was_batched(private: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny("bart"), documents("bart")
    handle = dpx.protect(model, private)
    handle.release(**inputs)
    handle.release(inputs["input_ids"][1, :4])
    handle.release(inputs["input_ids"][0])
    assert charges(handle) == [1, 1]


def test_a_second_release_is_refused_beyond_the_budget(private: dpx.DPXAttnConfig) -> None:
    model = tiny("t5")
    handle = dpx.protect(model, private)
    handle.release(**one("t5"))
    encoded: list[Any] = []
    model.get_encoder().register_forward_hook(lambda *a: encoded.append(a))
    with pytest.raises(dpx.BudgetExceededError):
        handle.release(**one("t5"), fresh=True)
    assert not encoded and charges(handle) == [1]


def test_releases_differ_and_reuse_does_not(private: dpx.DPXAttnConfig) -> None:
    model = tiny("t5")
    config = private.replace(epsilon=0.5)
    with dpx.protect(model, config, budget=dpx.Budget(2.0, 1e-4, "row", "replace_one")) as handle:
        first, again = (handle.release(**one("t5")) for _ in range(2))
        assert first.contexts[0] is again.contexts[0]
        fresh = handle.release(**one("t5"), fresh=True)
    sums = [r.contexts[0].structures[0].tensors()["sums"] for r in (first, fresh)]
    assert not torch.equal(*sums)


def test_documents_are_groups_of_one_context(private: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny("t5"), documents("t5", 3)
    handle = dpx.protect(model, private.replace(unit="group"))
    release = handle.release(**inputs, groups="documents")
    g = release.guarantees[0]
    assert (len(release), g.unit, g.units, g.rows) == (1, "group", 3, None)
    assert generate(model, release.inputs())[0].shape[0] == 1
    with pytest.raises(dpx.ConfigError, match="groups"):
        generate(model, inputs)


def test_documents_do_not_know_of_each_other(exact: dpx.DPXAttnConfig) -> None:
    """Replacing one document changes its rows and no other bit: the guarantee for a group is real."""
    model, inputs = tiny("bart"), documents("bart", 3)
    handle = dpx.protect(model, exact.replace(unit="group"))
    other = {k: v.clone() for k, v in inputs.items()}
    other["input_ids"][0] = torch.tensor([9, 8, 7, 6, 9, 8, 7])
    keys = [
        handle.release(**x, groups="documents").contexts[0].structures[0].tensors()["key"][0, 0]
        for x in (inputs, other)
    ]
    assert not torch.equal(keys[0][:7], keys[1][:7]) and torch.equal(keys[0][7:], keys[1][7:])


def test_groups_of_rows(private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny("bart"), private.replace(unit="group"))
    release = handle.release(torch.arange(10, 16), groups=torch.tensor([0, 0, 1, 1, 2, 2]))
    assert release.guarantees[0].units == 3


@pytest.mark.parametrize("mechanism", ["kernel_sum", "anchors"])
def test_files(mechanism: str, private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    config = private.replace(mechanism=mechanism)
    model = tiny("bart")
    with protect(model, config) as handle:
        release = handle.release(**documents("bart"))
        want = generate(model, release.inputs())
        release.save_pretrained(tmp_path)
    loaded = dpx.Release.from_pretrained(tmp_path, host=model)
    got = generate(model, loaded.inputs())
    assert torch.equal(want[0], got[0]) and torch.equal(want[1], got[1])
    dpx.unprotect(model)
    with pytest.raises(dpx.ReleaseError, match="fit"):
        dpx.Release.from_pretrained(tmp_path, host=tiny("t5"))
    with pytest.raises(dpx.ReleaseError, match="protected"):
        loaded.inputs()


def test_exact_rows_are_never_written(exact: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    release = dpx.protect(tiny("bart"), exact).release(**one("bart"))
    with pytest.raises(dpx.ReleaseError, match="never written"):
        release.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_context_that_grows(private: dpx.DPXAttnConfig) -> None:
    model = tiny("t5")
    handle = dpx.protect(model, private)
    release = handle.release(torch.arange(10, 20), horizon=3)
    before = generate(model, release.inputs())[1]
    release.append(torch.arange(20, 30))
    assert not torch.equal(before, generate(model, release.inputs())[1])
    assert charges(handle) == [1]


def test_hidden_states_and_embeddings_are_contexts(exact: dpx.DPXAttnConfig) -> None:
    model, inputs = tiny("bart"), one("bart")
    with torch.no_grad():
        states = model.get_encoder()(**inputs)[0]
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
    want = generate(model, inputs)
    handle = dpx.protect(model, exact)
    for given in (
        {"context": states},
        {"context": states[0]},
        {"encoder_outputs": (states,)},
        {"inputs_embeds": embeddings},
    ):
        got = generate(model, handle.release(**given).inputs())
        assert torch.equal(got[0], want[0]) and torch.allclose(got[1], want[1], atol=1e-5)
    assert torch.equal(generate(model, {"encoder_outputs": (states,)})[0], want[0])


BAD: dict[str, Any] = {
    "text": "a secret",
    "texts": ["a secret"],
    "nothing": {},
    "no rows": torch.zeros(1, 0, dtype=torch.int64),
    "ids out of range": torch.tensor([[5, 4000]]),
    "too many ids": torch.full((1, 65), 7),
    "negative ids": torch.tensor([[5, -1]]),
    "NaN": torch.full((1, 3, 16), torch.nan),
    "other channels": torch.zeros(1, 3, 17),
    "a mask that hides all": {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.zeros(1, 2, dtype=torch.int64),
    },
    "a mask of another length": {
        "input_ids": torch.tensor([[5, 6]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.int64),
    },
    "two contexts": {"input_ids": torch.tensor([[5, 6]]), "inputs_embeds": torch.zeros(1, 2, 16)},
    "an unknown name": {"prompt": torch.tensor([[5, 6]])},
    "no tensor": {"input_ids": [[5, 6]]},
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_contexts_cost_nothing_and_are_not_quoted(kind: str, private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny("bart"), private)
    with pytest.raises((dpx.ContextError, dpx.ConfigError)) as caught:
        handle.release(BAD[kind])
    assert "secret" not in str(caught.value) and "4000" not in str(caught.value)
    assert not handle.report().releases and not handle.ledger.entries()


def test_a_mask_that_cannot_be_followed_is_refused(private: dpx.DPXAttnConfig) -> None:
    handle = dpx.protect(tiny("moonshine"), private)
    mask = torch.ones(1, 4000, dtype=torch.int64)
    handle.release(input_values=torch.randn(1, 4000), attention_mask=mask)
    mask[:, 3000:] = 0
    with pytest.raises(dpx.ContextError, match="mask"):
        handle.release(input_values=torch.randn(1, 4000), attention_mask=mask)


def test_nothing_private_is_shown_or_copied(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    handle = dpx.protect(model, private)
    release = handle.release(torch.tensor([57, 58, 59]))
    texts = [
        repr(handle),
        repr(release),
        repr(release.contexts[0]),
        str(handle.report()),
        handle.report().to_json(),
    ]
    assert not any("57" in t and "58" in t for t in texts)
    for thing in (handle, release, model):
        for act in (copy.deepcopy, pickle.dumps):
            with pytest.raises(Exception):  # noqa: B017  pickle has errors of its own
                act(thing)


def test_the_report_says_what_is_promised_and_what_is_not(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart")
    handle = dpx.protect(model, private.replace(unit="group"))
    handle.release(**documents("bart", 3), groups="documents")
    report = handle.report()
    assert (report.host, report.layers, report.heads) == ("BartForConditionalGeneration", 2, 4)
    text = str(report)
    for phrase in (
        "epsilon",
        "one group of rows",
        "encoded apart",
        "how many there are (not how long each is)",
        "labels",
        "NOT covered",
    ):
        assert phrase in text
    assert "picture" not in text and "image" not in text.replace("step and image", "")


def test_anchors_need_a_calibration_of_this_model(private: dpx.DPXAttnConfig) -> None:
    from .calibrations import calibration_for

    config = private.replace(mechanism="anchors")
    for calibration in (None, calibration_for(tiny("t5"))):
        model = tiny("bart")
        with pytest.raises(dpx.ConfigError, match="calibrat"):
            dpx.protect(model, config, calibration=calibration)
        generate(model, one("bart"))  # nothing was patched


@pytest.mark.parametrize("depends", [False, True], ids=["whatever it holds", "by what it holds"])
def test_an_encoder_that_fails_does_not_quote_the_document(depends: bool, private: dpx.DPXAttnConfig) -> None:
    """What fails on a stand-in of the same shape costs nothing."""
    model = tiny("bart")
    handle = dpx.protect(model, private)

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if not depends or bool((kwargs["input_ids"] == 57).any()):
            raise RuntimeError(f"bad tokens {kwargs['input_ids'].tolist()}")

    model.get_encoder().register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(dpx.ContextError) as caught:
        handle.release(torch.tensor([57, 58]))
    assert "57" not in str(caught.value) and caught.value.__context__ is None
    assert not handle.report().releases and len(handle.ledger.entries()) == int(depends)


@pytest.mark.parametrize(("unit", "relation"), [("row", "add_or_remove_one"), ("context", "replace_one")])
def test_units_and_relations(unit: str, relation: str, private: dpx.DPXAttnConfig) -> None:
    model = tiny("t5")
    handle = dpx.protect(model, private.replace(unit=unit, neighboring=relation))
    release = handle.release(**documents("t5"))
    assert release.guarantees[1].rows is None
    assert len({c.rows for c in release.contexts}) == 1  # not the documents' lengths
    assert bool(generate(model, release.inputs())[1].isfinite().any())


def test_inference_mode_and_training_mode(private: dpx.DPXAttnConfig) -> None:
    model = tiny("bart").train()
    handle = dpx.protect(model, private)
    with torch.inference_mode():
        tokens = generate(model, one("bart"))[0]
    release = handle.release(**one("bart"))
    assert tokens.shape[0] == 1 and model.training
    model(**release.inputs(labels=torch.tensor([[4, 5, 6]]))).loss.backward()
