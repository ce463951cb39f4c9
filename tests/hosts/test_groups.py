"""The units that a mechanism is given are those that the user named: labels of all positions or of the private rows, under any mask."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.making import LayerRecipe
from hf_dp_xattn.mechanisms.kernel_sum import kernel_sum

from ..hosts_tiny import CHANNELS, LENGTH, tiny_sd
from .transformers.decoder_only import tiny as decoders
from .transformers.encoder_decoder import tiny as seq2seq
from .transformers.mllama import tiny as images

GROUPED = dpx.DPXAttnConfig(
    mechanism="kernel_sum", unit="group", epsilon=8.0, delta=1e-5, degree=1, projection_dim=4
)
SEQ2SEQ = ("bart", "t5", "bert2gpt2")


@functools.cache
def host(name: str) -> Any:
    builders = {
        "pipeline": tiny_sd,
        "image": images.tiny,
        "llama": lambda: decoders.tiny("llama"),
    }
    return builders[name]() if name in builders else seq2seq.tiny(name)


@contextmanager
def watched(name: str) -> Iterator[tuple[Any, list[Any], list[Any]]]:
    """A fresh handle; the rows and groups that its recipe is given; the units and the exact sums at the mechanism's border."""
    recipes: list[Any] = []
    sums: list[Any] = []
    run, add = LayerRecipe.run, kernel_sum.sum_units

    def spy_run(self: Any, rows: Any, groups: Any, entropy: Any) -> Any:
        recipes.append((rows.clone(), groups))
        return run(self, rows, groups, entropy)

    def spy_add(encoders: Any, keys: Any, values: Any, bound: int, units: Any) -> Any:
        found = add(encoders, keys, values, bound, units)
        sums.append((units, torch.cat([t.flatten().double() for t in found]) / bound))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerRecipe, "run", spy_run)
        patch.setattr(kernel_sum, "sum_units", spy_add)
        with dpx.protect(host(name), GROUPED, ledger=dpx.Ledger()) as handle:
            yield handle, recipes, sums


def partition(labels: torch.Tensor) -> set[frozenset[int]]:
    """The sets of indices of equal labels."""
    return {frozenset((labels == label).nonzero().flatten().tolist()) for label in labels.unique().tolist()}


def check_units(sums: list[Any], labels: torch.Tensor) -> None:
    (units, _) = sums[-1]
    assert {frozenset(u.tolist()) for u in units} == partition(labels)


@st.composite
def masked_labels(draw: Any, size: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask that is left, right, both, or has holes, and one label for each position."""
    n = draw(st.integers(2, 10)) if size is None else size
    kind = draw(st.sampled_from(["left", "right", "holes"]))
    if kind == "holes":
        mask = draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any))
    else:
        shown = draw(st.integers(1, n))
        mask = [i < shown for i in range(n)][:: -1 if kind == "left" else 1]
    labels = draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    return torch.tensor(mask), torch.tensor(labels)


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("given_as", ["input_ids", "encoder_outputs"])
@settings(max_examples=12, deadline=None)
@given(drawn=masked_labels(), whole=st.booleans())
def test_labels_of_masked_positions(
    name: str, given_as: str, drawn: tuple[torch.Tensor, torch.Tensor], whole: bool
) -> None:
    mask, labels = drawn
    n = len(mask)
    gen = torch.Generator().manual_seed(n)
    with watched(name) as (handle, recipes, sums):
        ids = torch.randint(5, seq2seq.VOCABULARY, (1, n), generator=gen)
        main = ids if given_as == "input_ids" else torch.randn(1, n, handle.host.channels, generator=gen)
        given_groups = labels if whole else labels[mask]
        handle.release(**{given_as: main}, attention_mask=mask.long().unsqueeze(0), groups=given_groups)
        check_units(sums, labels[mask])
        rows, groups = recipes[-1]
        assert torch.equal(groups, labels[mask])
        if given_as == "encoder_outputs":
            assert torch.equal(rows, main[0, mask])


@settings(max_examples=12, deadline=None)
@given(drawn=masked_labels(10))
def test_one_of_the_users_groups_moves_the_sum_by_no_more_than_is_charged(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    mask, labels = drawn
    gen = torch.Generator().manual_seed(0)
    with watched("bart") as (handle, _, sums):
        rows = 1e3 * torch.randn(1, 10, handle.host.channels, generator=gen)
        chosen = int(labels[mask][0])
        other = rows.clone()
        other[0, labels == chosen] = -1e3 * torch.randn(
            int((labels == chosen).sum()), handle.host.channels, generator=gen
        )
        for context in (rows, other):
            handle.release(encoder_outputs=context, attention_mask=mask.long().unsqueeze(0), groups=labels)
        moved = float((sums[-1][1] - sums[-2][1]).norm())
        assert moved <= 2.0  # clipping bounds


def test_the_issues_document() -> None:
    """Six tokens and four of padding, four groups: two of them are of private rows."""
    mask = torch.tensor([[1] * 6 + [0] * 4])
    ids = torch.arange(5, 15).unsqueeze(0)
    with watched("bart") as (handle, _, sums):
        handle.release(
            input_ids=ids, attention_mask=mask, groups=torch.tensor([0, 0, 0, 1, 1, 1, 9, 9, 9, 9])
        )
        assert [u.tolist() for u in sums[-1][0]] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("length", [5, 7, 9, 11])
def test_a_length_that_fits_neither_is_refused(length: int) -> None:
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0, 0]])
    with watched("bart") as (handle, _, sums):
        with pytest.raises(dpx.ContextError, match="groups"):
            handle.release(
                input_ids=torch.arange(5, 15).unsqueeze(0),
                attention_mask=mask,
                groups=torch.arange(length),
            )
        assert not handle.ledger.entries() and not sums


@pytest.mark.parametrize("name", ["whisper", "vit2gpt2"])
def test_labels_of_rows_that_are_not_known_yet_are_refused(name: str) -> None:
    with dpx.protect(seq2seq.tiny(name), GROUPED) as handle:
        for n in (0, 8):
            with pytest.raises(dpx.ContextError, match="encoded"):
                handle.release(**seq2seq.one(name), groups=torch.zeros(n, dtype=torch.int64))
        assert not handle.ledger.entries()


@pytest.mark.parametrize("mask", [torch.full((1, 7), -1e4), torch.tensor([[2] * 7])])
def test_a_mask_of_other_numbers_is_refused(mask: torch.Tensor) -> None:
    """An additive mask would be read the wrong way round."""
    with watched("bart") as (handle, _, _):
        with pytest.raises(dpx.ContextError, match="attention_mask"):
            handle.release(**{**seq2seq.one("bart"), "attention_mask": mask})
        assert not handle.ledger.entries()


@settings(max_examples=10, deadline=None)
@given(labels=st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH))
def test_labels_of_a_prompt(labels: list[int]) -> None:
    """The first row is public: of labels of all positions, the first is left out."""
    named = torch.tensor(labels)
    with watched("pipeline") as (handle, _, sums):
        handle.release("a red circle", groups=named)
        check_units(sums, named[1:])
    with watched("pipeline") as (handle, _, sums):
        handle.release("a red circle", groups=named[1:])
        check_units(sums, named[1:])
    with watched("pipeline") as (handle, _, sums):
        handle.release(torch.randn(LENGTH, CHANNELS), groups=named)
        check_units(sums, named)


def test_labels_that_fit_the_given_tokens_and_the_private_rows_alike_are_refused() -> None:
    """15 tokens of 16 positions: as labels of the tokens they would be shifted by one against those of the private rows."""
    with watched("pipeline") as (handle, _, sums):
        ids = torch.tensor([0, *range(5, 5 + LENGTH - 2)])
        assert len(ids) == LENGTH - 1
        with pytest.raises(dpx.ContextError, match="tokens as given"):
            handle.release(ids, groups=torch.arange(LENGTH - 1))
        with pytest.raises(dpx.ContextError, match="groups"):
            handle.release(ids[:4], groups=torch.arange(4))
        assert not handle.ledger.entries() and not sums
        handle.release(ids, groups=torch.arange(LENGTH))
        check_units(sums, torch.arange(LENGTH - 1))


@settings(max_examples=8, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=10, max_size=10),
    tiles=st.sampled_from([(1, 1), (1, 0)]),
    whole=st.booleans(),
)
def test_labels_of_an_images_rows(labels: list[int], tiles: tuple[int, int], whole: bool) -> None:
    image = images.images(1)
    image["aspect_ratio_mask"] = torch.tensor([[tiles]])
    image["aspect_ratio_ids"] = torch.tensor([[2 if tiles[1] else 1]])
    seen = torch.tensor(tiles).bool().repeat_interleave(images.PATCHES)
    named = torch.tensor(labels)
    with watched("image") as (handle, _, sums):
        handle.release(**image, groups=named if whole else named[seen])
        check_units(sums, named[seen])


@settings(max_examples=10, deadline=None)
@given(
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    head=st.integers(0, 4),
    whole=st.booleans(),
    apart=st.booleans(),
)
def test_labels_of_a_prefix(labels: list[int], head: int, whole: bool, apart: bool) -> None:
    """apart: the public head is given by its tokens."""
    named, ids = torch.tensor(labels), decoders.tokens(8)
    with watched("llama") as (handle, _, sums):
        handle.release(
            ids[head:] if apart else ids,
            public_head=ids[:head] if apart else head,
            groups=named if whole else named[head:],
        )
        check_units(sums, named[head:])


def test_units_that_are_encoded_apart() -> None:
    with watched("llama") as (handle, _, sums):
        handle.release(decoders.segments((3, 1, 4)), groups="segments")
        check_units(sums, torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]])
    with watched("bart") as (handle, _, sums):
        handle.release(input_ids=torch.randint(5, 50, (2, 5)), attention_mask=mask, groups="documents")
        check_units(sums, torch.tensor([0, 0, 0, 1, 1, 1]))
    with watched("pipeline") as (handle, _, sums):
        handle.release("a red circle, a tree", groups="phrases")
        check_units(sums, torch.arange(2).repeat_interleave(LENGTH - 1))
