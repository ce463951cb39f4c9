"""One release per prefix; the ledger; units; files; what may not be a prefix."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx

from .calibrations import protect
from .tiny import generate, questions, segments, tiny, tokens

PRIVATE = ("kernel_sum", "dptree", "anchors")
HEAD = [1, 4]


def charges(handle: Any) -> list[int]:
    return [r["charges"] for r in handle.report().releases]


@pytest.mark.parametrize("mechanism", PRIVATE)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("unit", ["row", "group", "context"])
def test_one_release_whatever_the_expansion(
    name: str, unit: str, mechanism: str, private: dpx.DPXAttnConfig
) -> None:
    model = tiny(name)
    handle = protect(model, private.replace(mechanism=mechanism, unit=unit))
    context: Any = segments((3, 1, 4)) if unit == "group" else tokens(8)
    groups = "segments" if unit == "group" else None
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}):
        release = handle.release(context, groups=groups, public_head=HEAD)
        scores = generate(model, release.inputs(**questions()), **options)[1]
        assert bool(torch.isfinite(scores).any()) and not bool(scores.isnan().any())
    assert charges(handle) == [1]
    guarantee = release.guarantees[0]
    assert guarantee.is_private and (guarantee.unit, guarantee.epsilon) == (unit, 8.0)
    assert (guarantee.rows, guarantee.units) == {"row": (8, 8), "group": (None, 3), "context": (None, 1)}[
        unit
    ]


def test_one_prefix_has_one_budget_however_it_is_split(private: dpx.DPXAttnConfig) -> None:
    """Behind another head, with another padded length or in other segments it is charged to the same name; other segments are other
    units, which do not compose."""
    handle = protect(tiny("llama"), private.replace(unit="group"))
    parts = segments((3, 1, 4))
    first = handle.release(parts, groups="segments", public_head=HEAD)
    assert handle.release(parts, groups="segments", public_head=HEAD).contexts[0] is first.contexts[0]
    flat = [*chain(*parts)]
    for arguments in (
        {"context": parts, "groups": "segments", "public_head": [1, 5]},
        {"context": parts, "groups": "segments"},
        {"context": parts, "groups": "segments", "public_head": HEAD, "prefix_bucket": 5},
        {"context": parts, "groups": "segments", "public_head": HEAD, "fresh": True},
    ):
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(**arguments)
    for arguments in (
        {"context": [flat[:4], flat[4:]], "groups": "segments", "public_head": HEAD},
        {"context": flat, "groups": torch.arange(8), "public_head": HEAD},
    ):
        with pytest.raises(dpx.ConfigError, match="another grouping"):
            handle.release(**arguments)
    assert charges(handle) == [1]


def test_a_refused_release_runs_nothing(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    handle = protect(model, private)
    handle.release(tokens(9))
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    with pytest.raises(dpx.BudgetExceededError):
        handle.release(torch.stack([tokens(9, 1), tokens(9)]), fresh=True)
    assert not ran and charges(handle) == [1]


def test_a_larger_budget_allows_a_second_one(private: dpx.DPXAttnConfig) -> None:
    budget = dpx.Budget(20.0, 1e-4, "row", "replace_one")
    handle = dpx.protect(tiny("llama"), private, budget=budget)
    first, second = handle.release(tokens(9)), handle.release(tokens(9), fresh=True)
    sums = [r.contexts[0].structures[0].tensors()["sums"] for r in (first, second)]
    assert not torch.equal(*sums) and charges(handle) == [2, 2]


def test_the_padded_length_is_all_that_shows(private: dpx.DPXAttnConfig) -> None:
    """Prefixes of 1 to 64 tokens give inputs of one shape; positions start behind head and padding."""
    handle = protect(tiny("llama"), private.replace(unit="context"))
    own = questions()
    shapes = set()
    for n in (1, 17, 64):
        inputs = handle.release(tokens(n, n), public_head=HEAD).inputs(**own)
        shapes.add((inputs["attention_mask"].shape, inputs["past_key_values"].get_seq_length()))
        assert torch.equal(inputs["attention_mask"][:, 66:], own["attention_mask"])
    assert shapes == {(torch.Size([2, 72]), 66)}
    assert handle.release(tokens(65)).contexts[0].rows == 128
    assert handle.release(tokens(5, 2), prefix_bucket=7).contexts[0].rows == 7


def test_the_head_stays_exact(exact: dpx.DPXAttnConfig, private: dpx.DPXAttnConfig) -> None:
    """Its rows are those of the head by itself, and private noise does not reach them."""
    rows = []
    for config in (exact, private):
        with protect(tiny("llama"), config) as handle:
            for n in (4, 9):
                rows.append(handle.release(tokens(n), public_head=HEAD).contexts[0].public_rows)
    assert all(torch.equal(r, rows[0]) and len(r) == 2 for r in rows)


@pytest.mark.parametrize("mechanism", PRIVATE)
@pytest.mark.parametrize("unit", ["row", "group"])
def test_saved_and_loaded(mechanism: str, unit: str, private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    config = private.replace(mechanism=mechanism, unit=unit)
    model, own = tiny("llama"), questions()
    with protect(model, config) as handle:
        context: Any = segments((3, 1, 4)) if unit == "group" else tokens(8)
        groups = "segments" if unit == "group" else None
        release = handle.release(context, groups=groups, public_head=HEAD)
        want = generate(model, release.inputs(**own))
        release.save_pretrained(tmp_path)
    other = tiny("llama")
    loaded = dpx.Release.from_pretrained(tmp_path, host=other)
    ids, scores = generate(other, loaded.inputs(**own))
    assert torch.equal(ids, want[0]) and torch.equal(scores, want[1])
    report = dpx.handle_of(other).report()
    assert "padded length" in str(report) and report.releases[0]["name"] == "loaded"
    with pytest.raises(dpx.ReleaseError):
        dpx.Release.from_pretrained(tmp_path, host=tiny("qwen2"))
    changed = tiny("llama")
    with torch.no_grad():
        changed.model.layers[0].mlp.down_proj.weight.normal_()
    with pytest.raises(dpx.ReleaseError):
        dpx.Release.from_pretrained(tmp_path, host=changed).inputs(**own)


def test_exact_rows_are_never_written(exact: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    release = dpx.protect(tiny("llama"), exact).release(tokens(8))
    with pytest.raises(dpx.ReleaseError):
        release.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_changed_weights_do_not_read_an_old_release(private: dpx.DPXAttnConfig) -> None:
    model = tiny("llama")
    release = protect(model, private).release(tokens(8))
    inputs = release.inputs(**questions())
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2.0)
    with pytest.raises(dpx.ReleaseError, match="weights"):
        model.generate(**inputs, max_new_tokens=2)


def test_a_group_calibration_serves_no_other_unit(private: dpx.DPXAttnConfig) -> None:
    from .calibrations import calibration_for

    model = tiny("llama")
    with pytest.raises(dpx.ConfigError):
        dpx.protect(model, private.replace(mechanism="anchors"), calibration=calibration_for(model, "group"))
    with pytest.raises(dpx.ConfigError, match="calibration"):
        dpx.protect(model, private.replace(mechanism="anchors"))
    assert dpx.handle_of(model) is None


BAD: dict[str, dict[str, Any]] = {
    "text": {"context": "be kind"},
    "nothing": {"context": []},
    "floats": {"context": torch.randn(5)},
    "booleans": {"context": torch.ones(5, dtype=torch.bool)},
    "out of range": {"context": [5, 40]},
    "negative": {"context": [5, -1]},
    "ragged": {"context": [[5, 6], [7]]},
    "three axes": {"context": torch.ones(1, 2, 3, dtype=torch.int64)},
    "all of it public": {"context": [5, 6], "public_head": 2},
    "too long a head": {"context": [5, 6], "public_head": 3},
    "negative head": {"context": [5, 6], "public_head": -1},
    "text as head": {"context": [5, 6], "public_head": "You are"},
    "too small a bucket": {"context": [5, 6, 7], "prefix_bucket": 2},
    "no bucket": {"context": [5, 6, 7], "prefix_bucket": 0},
    "growth": {"context": [5, 6, 7], "horizon": 3},
    "groups for rows": {"context": [5, 6, 7], "groups": torch.arange(3)},
}
BAD_GROUPS: dict[str, dict[str, Any]] = {
    "no groups": {"context": [5, 6]},
    "unknown": {"context": [[5, 6]], "groups": "phrases"},
    "not apart": {"context": [5, 6], "groups": "segments"},
    "an empty segment": {"context": [[5], []], "groups": "segments"},
    "no segments": {"context": [], "groups": "segments"},
    "head by number": {"context": [[5, 6]], "groups": "segments", "public_head": 1},
    "too few numbers": {"context": [5, 6, 7], "groups": torch.arange(2)},
}


@pytest.mark.parametrize("case", [*BAD, *BAD_GROUPS])
def test_bad_input_spends_nothing(case: str, private: dpx.DPXAttnConfig) -> None:
    arguments = BAD[case] if case in BAD else BAD_GROUPS[case]
    model = tiny("llama")
    handle = dpx.protect(model, private.replace(unit="group" if case in BAD_GROUPS else "row"))
    ran: list[Any] = []
    model.get_input_embeddings().register_forward_hook(lambda *a: ran.append(a))
    with pytest.raises((dpx.ContextError, dpx.ConfigError)):
        handle.release(**arguments)
    assert not ran and not handle.report().releases


def test_what_the_report_says(private: dpx.DPXAttnConfig) -> None:
    for unit, relation in (
        ("row", "replace_one"),
        ("group", "add_or_remove_one"),
        ("context", "replace_one"),
    ):
        with dpx.protect(tiny("llama"), private.replace(unit=unit, neighboring=relation)) as handle:
            report = handle.report()
        public, open_ends = " ".join(report.public), " ".join(report.not_covered)
        assert "public head" in public and "padded length" in public
        assert ("number of private tokens" in public) == (unit == "row")
        assert ("how many there are" in public) == (unit == "group" and relation == "replace_one")
        assert "own tokens" in open_ends and "timing" in open_ends


def test_a_saved_protection_is_restored(private: dpx.DPXAttnConfig, tmp_path: Path) -> None:
    """The model's folder brings its protection along, and no release; the ledger counts on."""
    model, own, ledger = tiny("llama"), questions(), dpx.Ledger()
    config = private.replace(mechanism="anchors", unit="group")
    handle = protect(model, config, ledger=ledger)
    parts = segments((3, 1, 4))
    release = handle.release(parts, groups="segments", public_head=HEAD)
    model.save_pretrained(tmp_path / "model")
    release.save_pretrained(tmp_path / "release")
    other = dpx.from_pretrained(tmp_path / "model", ledger=ledger)
    with pytest.raises(dpx.BudgetExceededError):
        dpx.handle_of(other).release(parts, groups="segments", public_head=HEAD)
    loaded = dpx.Release.from_pretrained(tmp_path / "release", host=other)
    want = generate(model, release.inputs(**own))
    ids, scores = generate(other, loaded.inputs(**own))
    assert torch.equal(ids, want[0]) and torch.equal(scores, want[1])
