"""One name for one content on all kinds of host: token ids, the text that they are of, and what a mask lets be seen."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_dp_xattn as dpx
from hf_dp_xattn import BudgetExceededError, ConfigError
from hf_dp_xattn.hosts.content_names import content_of, name_of_text
from hf_dp_xattn.hosts.context import plain_bytes

from ..hosts_tiny import CHANNELS, tiny_sd
from .transformers.decoder_only.tiny import tiny as decoder_tiny
from .transformers.encoder_decoder.tiny import one
from .transformers.encoder_decoder.tiny import tiny as seq2seq_tiny
from .transformers.mllama.tiny import images
from .transformers.mllama.tiny import tiny as image_tiny

CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", degree=1, projection_dim=2, unit="context", epsilon=8.0)
MAKERS: dict[str, Any] = {
    "bart": lambda: seq2seq_tiny("bart"),
    "t5": lambda: seq2seq_tiny("t5"),
    "llama": lambda: decoder_tiny("llama"),
    "pipeline": tiny_sd,
}
BODY = torch.arange(5, 16)


def refused(handle: Any, *context: Any, **options: Any) -> None:
    before = handle.ledger.entries()
    with pytest.raises(BudgetExceededError):
        handle.release(*context, **options)
    assert handle.ledger.entries() == before


def ids_for(kind: str, pipe: Any) -> torch.Tensor:
    """The same ids on all hosts; a pipeline's begin with its BOS."""
    return torch.cat([torch.tensor([pipe.tokenizer.bos_token_id]), BODY])


@pytest.mark.parametrize("first", MAKERS)
@pytest.mark.parametrize("second", MAKERS)
def test_token_ids_have_one_name_on_all_hosts(first: str, second: str) -> None:
    if first == second:
        return
    ledger = dpx.Ledger()
    ids = ids_for(first, tiny_sd())
    dpx.protect(MAKERS[first](), CONFIG, ledger=ledger).release(ids)
    refused(dpx.protect(MAKERS[second](), CONFIG, ledger=ledger), ids)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_special_tokens_and_padding_are_no_part_of_the_content(kind: str) -> None:
    """BART's tokenizer puts 0 before and 2 behind; other hosts read the bare tokens."""
    ledger = dpx.Ledger()
    wrapped = torch.cat([torch.tensor([0]), BODY, torch.tensor([2, 1, 1])])
    dpx.protect(seq2seq_tiny("bart"), CONFIG, ledger=ledger).release(wrapped)
    refused(dpx.protect(MAKERS[kind](), CONFIG, ledger=ledger), BODY)


def test_a_public_head_that_was_given_with_the_prefix_hides_nothing() -> None:
    ledger = dpx.Ledger()
    given_ids = torch.cat([torch.tensor([7]), BODY])  # no special token of anybody
    dpx.protect(decoder_tiny("llama"), CONFIG, ledger=ledger).release(given_ids, public_head=1)
    refused(dpx.protect(seq2seq_tiny("bart"), CONFIG, ledger=ledger), given_ids)


@pytest.mark.parametrize("kind", MAKERS)
def test_what_an_earlier_version_charged_still_counts(kind: str) -> None:
    host = MAKERS[kind]()
    ids = ids_for(kind, tiny_sd())
    former: tuple[bytes, ...] = (b"prefix", plain_bytes(ids))
    if kind in ("bart", "t5"):
        former = (b"input_ids", repr(tuple(ids.shape)).encode(), plain_bytes(ids), b"")
    if kind == "pipeline":
        pad = host.tokenizer.pad_token_id
        padded = torch.nn.functional.pad(
            ids, (0, host.tokenizer.model_max_length - len(ids)), value=0 if pad is None else pad
        )
        former = (b"token ids", plain_bytes(padded))
    ledger = dpx.Ledger()
    spent = dpx.protect(host, CONFIG, ledger=ledger)
    spent.release(BODY if kind != "pipeline" else ids[:1])
    events = ledger.entries()[0].events
    other = dpx.Ledger()
    dpx.unprotect(host)
    other.charge(other.digest(former), events, spent.budget)
    refused(dpx.protect(host, CONFIG, ledger=other), ids)
    dpx.unprotect(host)
    room = dpx.Budget(100.0, 1e-3)
    dpx.protect(host, CONFIG, ledger=other, budget=room).release(ids)
    assert len(other.charges(other.digest(former))) == 2  # and goes on being counted


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.lists(st.integers(0, 3), max_size=4),
    st.lists(st.integers(0, 3), max_size=4),
)
@settings(max_examples=200)
def test_content_is_what_stands_between_special_tokens(
    inner: list[int], before: list[int], behind: list[int]
) -> None:
    special = frozenset(range(4))
    found = content_of(torch.tensor(inner), special)
    wrapped = content_of(torch.tensor([*before, *inner, *behind]), special)
    if all(i in special for i in inner):
        assert found is None and wrapped is None
        return
    assert found is not None and wrapped is not None
    assert [*before, *inner, *behind][wrapped] == inner[found]
    assert inner[found][0] not in special and inner[found][-1] not in special


TEXT = "the code of the vault"


@pytest.mark.parametrize("kind", ["bart", "llama"])
def test_the_text_that_ids_are_of_is_charged_as_well(kind: str) -> None:
    ledger = dpx.Ledger()
    dpx.protect(MAKERS[kind](), CONFIG, ledger=ledger).release(BODY, text=TEXT)
    refused(dpx.protect(tiny_sd(), CONFIG, ledger=ledger), TEXT)
    other = MAKERS["llama" if kind == "bart" else "bart"]()
    refused(dpx.protect(other, CONFIG, ledger=ledger), BODY + 9, text=f" {TEXT}\n")


@pytest.mark.parametrize(
    ("kind", "options"), [("bart", {"groups": "documents"}), ("llama", {"groups": "segments"})]
)
def test_the_texts_of_units_are_charged_one_by_one(kind: str, options: Any) -> None:
    config = CONFIG.replace(unit="group")
    handle = dpx.protect(MAKERS[kind](), config, ledger=dpx.Ledger())
    parts = torch.stack([BODY, BODY.flip(0)])
    context = parts if kind == "bart" else list(parts)
    for wrong in (["one"], "one"):
        with pytest.raises(ConfigError, match="text"):
            handle.release(context, text=wrong, **options)
    assert handle.ledger.entries() == ()
    handle.release(context, text="a zebra\nan obelisk", **options)
    pipe = dpx.protect(tiny_sd(), config, ledger=handle.ledger)
    refused(pipe, "a zebra, an obelisk".replace(", ", "\n"), groups="phrases")
    if kind == "bart":
        refused(pipe, "a zebra", groups="phrases")


def test_a_text_of_another_number_or_type_is_refused() -> None:
    handle = dpx.protect(seq2seq_tiny("bart"), CONFIG, ledger=dpx.Ledger())
    for wrong in (["one", "two"], 3, [3]):
        with pytest.raises(ConfigError, match="text"):
            handle.release(BODY, text=wrong)
    assert handle.ledger.entries() == ()


def test_line_ends_are_no_part_of_a_text() -> None:
    assert name_of_text("a\r\nb") == name_of_text("a\nb")
    handle = dpx.protect(tiny_sd(), CONFIG, ledger=dpx.Ledger())
    found = handle.release("a\nb")
    assert handle.release("a\r\nb").contexts == found.contexts


@pytest.mark.parametrize("pad", [0, 1, 4, 8])
def test_a_recording_has_one_name_however_it_is_padded(pad: int) -> None:
    recording = torch.randn(1, 24, 4, generator=torch.Generator().manual_seed(0))
    handle = dpx.protect(seq2seq_tiny("speech2text"), CONFIG, ledger=dpx.Ledger())
    handle.release(input_features=recording)
    features = torch.nn.functional.pad(recording, (0, 0, 0, pad), value=0.5)
    mask = torch.cat([torch.ones(1, 24), torch.zeros(1, pad)], 1).long()
    refused(handle, input_features=features, attention_mask=mask, fresh=True)


def test_what_a_mask_of_tiles_hides_is_no_part_of_an_image() -> None:
    given_image = images(1, seed=3)
    given_image["aspect_ratio_ids"] = torch.tensor([[1]])
    given_image["aspect_ratio_mask"] = torch.tensor([[[1, 0]]])
    handle = dpx.protect(image_tiny(), CONFIG, ledger=dpx.Ledger())
    handle.release(**given_image)
    for fill in (0.0, 1.0):
        pixels = given_image["pixel_values"].clone()
        pixels[0, 0, 1] = fill
        refused(handle, **{**given_image, "pixel_values": pixels})


def _release_cast(handle: Any, inputs: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    handle.release(**{**inputs, name: inputs[name].to(dtype)})


def _release_rows(handle: Any, rows: torch.Tensor, dtype: torch.dtype) -> None:
    handle.release(rows.to(dtype))


@pytest.mark.parametrize("what", ["recording", "embeddings"])
def test_half_precision_is_no_other_name(what: str) -> None:
    """A model in half precision makes the same of both."""
    if what == "recording":
        handle = dpx.protect(seq2seq_tiny("whisper"), CONFIG, ledger=dpx.Ledger())
        inputs = one("whisper", 1)
        name = next(n for n in inputs if n != "attention_mask")
        make = partial(_release_cast, handle, inputs, name)
    else:
        handle = dpx.protect(tiny_sd().unet, CONFIG, ledger=dpx.Ledger())
        rows = torch.randn(5, CHANNELS)
        make = partial(_release_rows, handle, rows)
    make(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(dpx.BudgetExceededError):
            make(dtype)


def test_a_text_of_one_group_is_one_unit_of_every_corpus() -> None:
    config = CONFIG.replace(unit="group", epsilon=2.0)
    handle = dpx.protect(seq2seq_tiny("bart"), config, ledger=dpx.Ledger(), budget=dpx.Budget(100.0, 1e-5))
    a, b = torch.arange(5, 15), torch.arange(15, 25)
    handle.release(a, groups=torch.zeros(10, dtype=torch.int64), text="hello")
    handle.release(input_ids=torch.stack([a, b]), groups="documents", text=["hello", "x"])
    with pytest.raises(dpx.ConfigError, match="grouping"):
        handle.release(torch.arange(4, 14), groups=torch.arange(10) // 5, text="hello")
