"""One context under two groupings: what is a unit in the one is none in the other, so that the two are never added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_dp_xattn as dpx
from hf_dp_xattn import BudgetExceededError, ConfigError
from hf_dp_xattn.hosts.grouping import canonical, partition, whole

from ..hosts_tiny import LENGTH, tiny_sd
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from .transformers.mllama.tiny import images
from .transformers.mllama.tiny import tiny as image_tiny

GROUPED = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="group", projection_dim=4, degree=1)
ROOM = dpx.Budget(1000.0, 1e-2)  # budget is not what stops them
IDS = torch.arange(4, 12)
ROWS = torch.arange(8 * 32).reshape(8, 32) / 100.0
LABELS = st.lists(st.integers(-3, 3), min_size=1, max_size=12).map(torch.tensor)


@given(LABELS, st.permutations(list(range(-3, 4))))
def test_a_partition_has_one_name_whatever_its_labels(labels: torch.Tensor, renamed: list[int]) -> None:
    other = torch.tensor([7 * renamed[int(i) + 3] - 40 for i in labels])
    assert torch.equal(canonical(other), canonical(labels))
    for apart in (False, True):
        assert partition(other, apart=apart) == partition(labels, apart=apart)
    seen: dict[int, int] = {}
    assert canonical(labels).tolist() == [seen.setdefault(int(i), len(seen)) for i in labels]


@given(LABELS, LABELS)
@settings(max_examples=200)
def test_two_partitions_have_two_names(one: torch.Tensor, two: torch.Tensor) -> None:
    def pairs(labels: torch.Tensor) -> list[list[bool]]:
        return (labels[:, None] == labels[None, :]).tolist()

    for apart in (False, True):
        same = partition(one, apart=apart) == partition(two, apart=apart)
        assert same == (pairs(one) == pairs(two))


def test_groups_encoded_apart_are_others_unless_there_is_one() -> None:
    assert partition(torch.tensor([0, 1]), apart=True) != partition(torch.tensor([0, 1]), apart=False)
    assert partition(torch.tensor([3, 3]), apart=True) == partition(torch.tensor([0, 0]), apart=False)
    assert whole(2) == partition(torch.tensor([5, 5]), apart=True)


def pixels(handle: Any, groups: Any, **options: Any) -> Any:
    return handle.release(**images(1), groups=groups, **options)


Way = Callable[..., Any]
INTEGERS: dict[str, tuple[Any, Way, int]] = {
    "embeddings": (tiny_sd, lambda h, g, **o: h.release(ROWS, groups=g, **o), 8),
    "prompt": (tiny_sd, lambda h, g, **o: h.release("a red circle", groups=g, **o), LENGTH - 1),
    "bart": (lambda: seq2seq_tiny("bart"), lambda h, g, **o: h.release(IDS, groups=g, **o), 8),
    "llama": (lambda: decoder_tiny("llama"), lambda h, g, **o: h.release(IDS, groups=g, **o), 8),
    "mllama": (image_tiny, pixels, 0),
}


def rows_of(handle: Any, name: str, count: int) -> int:
    if name == "mllama":
        context = handle.host.name(images(1), None)[0][0]
        return int(context.private_rows)
    return count


def refused(call: Callable[[], Any], handle: Any) -> None:
    before = handle.ledger.entries()
    with pytest.raises(ConfigError, match="another grouping"):
        call()
    assert handle.ledger.entries() == before


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    make, release, count = INTEGERS[name]
    handle = dpx.protect(make(), GROUPED, budget=ROOM)
    n = rows_of(handle, name, count)
    coarse = torch.zeros(n, dtype=torch.int64)
    first = release(handle, coarse)
    refused(lambda: release(handle, torch.arange(n)), handle)
    refused(lambda: release(handle, torch.arange(n) // 2), handle)
    assert release(handle, coarse + 5).contexts == first.contexts  # renamed: the same units, and served again
    release(handle, coarse - 1, fresh=True)  # composes
    assert max(c.number_of_releases for c in handle.ledger.entries()) == 2
    second = dpx.protect(make(), GROUPED, budget=ROOM)  # the ledger knows, whoever asks
    refused(lambda: release(second, torch.arange(n)), second)


def test_segments_of_a_prefix() -> None:
    handle = dpx.protect(decoder_tiny("llama"), GROUPED, budget=ROOM)

    def release(*cuts: int, **options: Any) -> Any:
        return handle.release([p.tolist() for p in IDS.tensor_split(cuts)], groups="segments", **options)

    release(3, 5)
    refused(lambda: release(3), handle)
    refused(lambda: release(2, 5), handle)
    refused(lambda: release(), handle)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    refused(lambda: handle.release(IDS, groups=labels), handle)  # the same rows, but not encoded apart
    release(3, 5, fresh=True)
    release(3, 5, prefix_bucket=32)  # padded in another way: another release of the same units


def test_phrases_of_a_text() -> None:
    handle = dpx.protect(tiny_sd(), GROUPED, budget=ROOM)
    handle.release("a b, c", groups="phrases")
    refused(lambda: handle.release(["a b, c"], groups="phrases"), handle)  # the same text, cut in another way
    refused(lambda: handle.release("a b, c", groups=torch.arange(LENGTH - 1)), handle)
    handle.release(["a b", "c"], groups="phrases", fresh=True)
    plain = dpx.protect(tiny_sd(), GROUPED, budget=ROOM)
    plain.release("d, e", groups=torch.arange(LENGTH - 1))
    refused(lambda: plain.release("d, e", groups="phrases"), plain)


def test_a_document_in_a_corpus_is_one_unit() -> None:
    handle = dpx.protect(seq2seq_tiny("bart"), GROUPED, budget=ROOM)
    handle.release(IDS, groups=torch.arange(8))
    both = torch.stack([IDS, IDS + 8])
    refused(lambda: handle.release(both, groups="documents"), handle)
    handle.release(both + 1, groups="documents")
    handle.release(both[:1] + 1, groups="documents", fresh=True)  # the same document alone: composes
    handle.release(both[0] + 1, groups=torch.zeros(8, dtype=torch.int64), fresh=True)
    refused(lambda: handle.release(both[1] + 1, groups=torch.arange(8)), handle)


def test_what_is_appended() -> None:
    handle = dpx.protect(tiny_sd(), GROUPED, budget=ROOM)
    handle.release(ROWS, groups=torch.arange(8) // 4)
    growing = handle.release(ROWS + 1, groups=torch.arange(8) // 4, horizon=3)
    refused(lambda: growing.append(ROWS, groups=torch.arange(8) + 9), handle)
    growing.append(ROWS, groups=torch.arange(8) // 4 + 9)  # other labels, the same units


def test_the_unit_of_rows_asks_for_no_grouping() -> None:
    config = GROUPED.replace(unit="row")
    handle = dpx.protect(decoder_tiny("llama"), config, budget=ROOM)
    handle.release(IDS)
    handle.release([IDS[:3].tolist(), IDS[3:].tolist()], groups="segments")
    with pytest.raises(BudgetExceededError):
        dpx.protect(decoder_tiny("llama"), config).release(IDS)
