"""What the ledger takes for one context, however it was given; and what it takes for several."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn import BudgetExceededError, ConfigError, ContextError
from hf_dp_xattn.hosts.context import Trial
from hf_dp_xattn.hosts.diffusers.prompt_contexts import from_phrases
from hf_dp_xattn.hosts.transformers.encoder_decoder.document_contexts import name_inputs

from ..hosts_tiny import tiny_sd
from .anchor_calibrations import protect
from .transformers.encoder_decoder.tiny import tiny

TEXT = "a red circle"
GROUPED = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", projection_dim=4, degree=1)
A, B, C = (torch.tensor([5, 6, 7, k]) for k in (8, 9, 10))


def _name(ids: torch.Tensor) -> tuple[bytes, ...]:
    trial = Trial(0, lambda: torch.zeros(0, 0))
    return name_inputs({"input_ids": ids}, 0, lambda inputs: (inputs["input_ids"], None), lambda _: trial)[
        0
    ].name


def documents(*parts: torch.Tensor) -> Any:
    return torch.stack(parts)


@pytest.fixture
def corpus(private: dpx.DPXAttnConfig) -> Any:
    with dpx.protect(tiny("bart"), private.replace(unit="group", neighboring="replace_one")) as handle:
        yield handle


def again(handle: Any, *given: Any, error: Any = BudgetExceededError, **options: Any) -> None:
    """It is known: refused for want of budget (or as what does not compose), with nothing spent."""
    before = handle.ledger.entries()
    with pytest.raises(error):
        handle.release(*given, fresh=True, **options)
    assert handle.ledger.entries() == before


@pytest.mark.parametrize("phrases", [TEXT, [TEXT], "a red circle, a blue square"], ids=["one", "list", "two"])
def test_a_prompt_has_one_name_whole_or_in_phrases(pipe: Any, phrases: Any) -> None:
    """Its phrases are not the units of its rows, so that the two do not compose: the second is refused."""
    whole = phrases[0] if isinstance(phrases, list) else phrases
    handle = protect(pipe, GROUPED)
    handle.release(whole, groups=torch.arange(16) // 4)
    again(handle, phrases, error=ConfigError, groups="phrases")
    other = protect(tiny_sd(), GROUPED, ledger=dpx.Ledger())
    other.release(phrases, groups="phrases")
    again(other, whole, error=ConfigError, groups=torch.arange(16) // 4)


@pytest.mark.parametrize(
    "other",
    ["a red circle and a blue square", "a red circle; a blue square", ["a red circle", "a blue square"]],
    ids=["and", "semicolon", "list"],
)
def test_phrases_have_one_name_whatever_stands_between_them(pipe: Any, other: Any) -> None:
    handle = protect(pipe, GROUPED)
    release = handle.release("a red circle\na blue square", groups="phrases")
    assert handle.release(other, groups="phrases").contexts == release.contexts  # it is the same one
    again(handle, other, groups="phrases")
    growing = protect(tiny_sd(), GROUPED, ledger=dpx.Ledger()).release("zebra", groups="phrases", horizon=4)
    growing.append("a red circle , a blue square", groups="phrases")
    with pytest.raises(ContextError, match="already"):
        growing.append(other, groups="phrases")


def test_phrases_that_are_split_in_another_way_are_of_the_same_text_and_other_units(pipe: Any) -> None:
    handle = protect(pipe, GROUPED, budget=dpx.Budget(100.0, 1e-3))
    handle.release(["a red circle, a blue square", "zebra"], groups="phrases")
    again(handle, ["a red circle", "a blue square, zebra"], error=ConfigError, groups="phrases")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16], ids=str)
def test_the_type_of_token_ids_is_no_part_of_the_name(private: Any, dtype: torch.dtype) -> None:
    with dpx.protect(tiny("bart"), private) as handle:
        handle.release(A)
        again(handle, A.to(dtype))
        again(handle, A.to(dtype).unsqueeze(0), groups="documents")


@pytest.mark.parametrize("pad", [0, 1, 9], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding_is_no_part_of_the_name(private: Any, left: bool, pad: int) -> None:
    filling = torch.full((3,), pad)
    ids = torch.cat([filling, A] if left else [A, filling])
    mask = torch.cat([torch.zeros(3), torch.ones(4)] if left else [torch.ones(4), torch.zeros(3)]).long()
    with dpx.protect(tiny("bart"), private) as handle:
        handle.release(A)
        again(handle, input_ids=ids.unsqueeze(0), attention_mask=mask.unsqueeze(0))


@pytest.mark.parametrize("documents_of", [False, True], ids=["one text", "documents"])
def test_other_positions_are_another_release_of_the_same_document(private: Any, documents_of: bool) -> None:
    options: dict[str, Any] = {"groups": "documents"} if documents_of else {}
    padded = torch.cat([torch.ones(3, dtype=torch.int64), A]).unsqueeze(0)
    mask = (torch.arange(7) >= 3).long().unsqueeze(0)
    with dpx.protect(tiny("bart"), private, budget=dpx.Budget(100.0, 1e-3)) as handle:
        plain = handle.release(A.unsqueeze(0), **options)
        for _ in range(2):
            left = handle.release(input_ids=padded, attention_mask=mask, **options)
            assert left.contexts[0] is not plain.contexts[0]
        assert len(handle.ledger.entries()) == 2


def test_what_is_served_again_needs_no_ledger(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = protect(pipe, GROUPED.replace(unit="row"))
    context = handle.release(TEXT).contexts[0]

    def locked(self: Any) -> Any:
        raise AssertionError("the ledger was asked")

    monkeypatch.setattr(dpx.Ledger, "_reserved", locked)
    assert handle.releases.make(handle.host.name(TEXT, None)[0]) == [context]


def test_a_report_counts_what_its_documents_spent(private: Any) -> None:
    config = private.replace(unit="group")
    with dpx.protect(tiny("bart"), config, budget=dpx.Budget(30.0, 1e-3)) as handle:
        handle.release(documents(A), groups="documents")
        handle.release(documents(A, B), groups="documents")
        alone, both = handle.report().releases
        assert (alone["charges"], both["charges"]) == (2, 2)
        spent = handle.ledger.spent(handle.ledger.digest(_name(A)), config.delta)
        assert both["spent_epsilon"] == spent > config.epsilon


def test_a_batch_is_checked_as_a_whole(pipe: Any) -> None:
    """Two contexts of one name: the second would not compose, so that nothing is charged."""
    handle = protect(pipe, GROUPED)
    contexts = [from_phrases(p, handle.text) for p in (["a", "b, c"], ["a, b", "c"])]
    with pytest.raises(ConfigError, match="grouping"):
        handle.releases.make(contexts)
    assert handle.ledger.entries() == ()


def test_each_document_of_a_corpus_is_charged(corpus: Any) -> None:
    corpus.release(documents(A, B), groups="documents")
    assert len({c.digest for c in corpus.ledger.entries()}) == 3  # the corpus and its documents
    again(corpus, documents(A), groups="documents")
    again(corpus, documents(C, B), groups="documents")
    corpus.release(documents(C), groups="documents")


def test_equal_documents_of_one_corpus_are_units_of_their_own(corpus: Any) -> None:
    release = corpus.release(documents(A, B, A), groups="documents")
    assert release.guarantees[0].units == 3
    assert len(corpus.ledger.entries()) == 3  # the corpus, A, B


def test_what_was_appended_has_spent_its_budget(corpus: Any) -> None:
    release = corpus.release(documents(A), groups="documents", horizon=4)
    release.append(documents(B), groups="documents")
    again(corpus, documents(B), groups="documents")
    for more in (documents(B), documents(A, C), documents(C, B)):
        with pytest.raises(ContextError, match="in the growing context already"):
            release.append(more, groups="documents")
    corpus.release(documents(C), groups="documents")
    before = corpus.ledger.entries()
    with pytest.raises(BudgetExceededError):
        release.append(documents(C), groups="documents")
    assert corpus.ledger.entries() == before
    assert release.guarantees[0].units == 2


@pytest.mark.parametrize(
    ("planted", "error"),
    [
        (lambda release: (type(release._growing.release), "append"), ContextError),
        (lambda release: (type(release._growing.recipe), "private"), RuntimeError),
    ],
    ids=["bad rows", "out of memory"],
)
def test_an_append_that_failed_is_made_again_without_a_second_charge(
    corpus: Any, monkeypatch: pytest.MonkeyPatch, planted: Any, error: type[Exception]
) -> None:
    release = corpus.release(documents(A), groups="documents", horizon=4)

    def fails(*given: Any, **options: Any) -> Any:
        raise error("planted")

    with monkeypatch.context() as patch:
        patch.setattr(*planted(release), fails)
        with pytest.raises(error, match="planted"):
            release.append(documents(B), groups="documents")
    charged = corpus.ledger.entries()
    release.append(documents(B), groups="documents")
    assert corpus.ledger.entries() == charged and release.guarantees[0].units == 2


@pytest.mark.parametrize("other", [{"unit": "context"}, {"neighboring": "add_or_remove_one"}], ids=str)
def test_a_budget_is_in_the_unit_and_relation_of_what_is_released(pipe: Any, other: dict[str, str]) -> None:
    config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", projection_dim=4, degree=1)
    with pytest.raises(ConfigError, match="budget is for"):
        protect(pipe, config, budget=dpx.Budget(8.0, 1e-5, **other))
    with protect(pipe, config, budget=dpx.Budget(8.0, 1e-5)) as handle:
        handle.release(TEXT)
        assert {(c.unit, c.neighboring) for c in handle.ledger.entries()} == {("row", "replace_one")}
    later = protect(pipe, config.replace(**other), ledger=handle.ledger, budget=dpx.Budget(99.0, 1e-2))
    with pytest.raises(ConfigError, match="another unit"):
        later.release(TEXT)


def test_an_append_that_failed_is_not_made_again_under_other_groups(private: Any) -> None:
    """It was charged as ONE unit; as six, the release would hold other units than the ledger knows."""
    config = private.replace(unit="group", neighboring="replace_one")
    generator = torch.Generator().manual_seed(0)
    first, more = (torch.randn(6, 16, generator=generator) for _ in range(2))
    with dpx.protect(tiny("bart"), config, budget=dpx.Budget(1000.0, 1e-2)) as handle:
        release = handle.release(first, groups=torch.zeros(6).long(), horizon=4)

        def fails(*given: Any) -> Any:
            raise MemoryError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(release._growing.recipe), "private", fails)
            with pytest.raises(MemoryError):
                release.append(more, groups=torch.ones(6).long())
        charged = handle.ledger.entries()
        with pytest.raises(ConfigError, match="grouping"):
            release.append(more, groups=torch.arange(6) + 10)
        release.append(more, groups=torch.ones(6).long())
        assert handle.ledger.entries() == charged and release.guarantees[0].units == 2
