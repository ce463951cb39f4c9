"""unit="group" on text: phrases that are encoded one by one, so that replacing one of them changes no other one's rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ContextError
from hf_dp_xattn.hosts.diffusers.phrases import MAX_PHRASES, check_phrases, encode_tokens, split_phrases

from ...hosts_tiny import CHANNELS, LENGTH, picture, tiny_sd, tiny_unet
from ..anchor_calibrations import BOTH, CONFIG, calibration_for, protect

PROMPT = "a red cat, by day"
PHRASES = ["a red cat", "by day"]
SPLITS = {
    "a red cat, by day": PHRASES,
    "a red cat and by day": PHRASES,
    " a red cat ;\n by day ": PHRASES,
    "a red cat AND by day,": PHRASES,
    "sand, a handle": ["sand", "a handle"],
    "one phrase": ["one phrase"],
    "a black-and-white photo": ["a black-and-white photo"],
    "rock-and-roll and jazz": ["rock-and-roll", "jazz"],
    "1,000 paper birds, 2,500.5 cranes": ["1,000 paper birds", "2,500.5 cranes"],
    "3, 4 birds,5 eggs": ["3", "4 birds", "5 eggs"],
    "red and, blue,and green;AND": ["red", "blue", "green"],
    "a red cat\r\nby day": PHRASES,
    "one\x0cline\u2028of\x85text\ra unit": ["one\x0cline\u2028of\x85text\ra unit"],
    "\ufeffa red cat,\ufeff by day": ["a red cat", "\ufeff by day"],
    ", and ;": [],
    "": [],
}


def encode_phrases(text: Any, phrases: list[str]) -> list[torch.Tensor]:
    return encode_tokens(text, [text.tokenize(phrase) for phrase in phrases])


@pytest.mark.parametrize("text", SPLITS)
def test_the_rule(text: str) -> None:
    assert split_phrases(text) == SPLITS[text]


def test_a_mark_is_no_part_of_a_phrase_in_a_list() -> None:
    assert check_phrases(["\ufeffa red cat", " by day\r\n"]) == PHRASES


@pytest.fixture
def groups(private: Any) -> Any:
    return private.replace(unit="group")


@BOTH
def test_a_context_of_phrases(groups: Any) -> None:
    pipe = tiny_sd()
    handle = protect(pipe, groups)
    release = handle.release(PHRASES, groups="phrases")
    assert len(release) == 1
    (guarantee,) = release.guarantees
    assert (guarantee.units, guarantee.rows, guarantee.unit) == (2, 2 * (LENGTH - 1), "group")
    assert release.inputs()["prompt_embeds"].shape == (1, LENGTH, CHANNELS)
    assert bool(picture(pipe, **release.inputs(prompt="ink")).isfinite().all())
    assert (
        handle.release(PROMPT, groups="phrases").contexts == release.contexts
    )  # the same phrases: one release
    assert len(handle.report().releases) == 1
    other = handle.release(PHRASES[::-1], groups="phrases")
    assert (
        other.contexts != release.contexts and len(handle.ledger.entries()) == 12
    )  # phrases, ids (3) and text


def test_each_phrase_is_encoded_by_itself(pipe: Any) -> None:
    """Another second phrase leaves the first one's rows alone, bit for bit; in one text it does not."""
    handle = protect(pipe, CONFIG.replace(unit="group"))
    text = handle.text
    a, b = (encode_phrases(text, [PHRASES[0], second]) for second in ("by day", "low"))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    whole = [
        text.private_rows(*text.tokenize(f"{second}, {PHRASES[0]}"))[0] for second in ("by day", "by low")
    ]
    assert not torch.equal(whole[0][8:], whole[1][8:])


def test_what_is_released_are_the_phrases_rows(pipe: Any) -> None:
    """mechanism="none": attention to exactly these rows."""
    handle = dpx.protect(pipe, dpx.DPXAttnConfig(mechanism="none", unit="group"))
    image = picture(pipe, **handle.release(PHRASES, groups="phrases").inputs(), guidance_scale=1.0)
    rows = torch.cat([handle.text.public_first_row(), *encode_phrases(handle.text, PHRASES)])
    dpx.unprotect(pipe)
    plain = picture(pipe, prompt_embeds=rows.unsqueeze(0), guidance_scale=1.0)
    assert torch.allclose(image, plain, atol=1e-4)


def test_a_calibration_for_phrases_splits_by_default(pipe: Any) -> None:
    handle = protect(pipe, CONFIG.replace(unit="group"))
    image = picture(pipe, PROMPT)
    assert handle.release(PHRASES, groups="phrases").contexts == handle.release(PROMPT).contexts
    assert torch.equal(image, picture(pipe, **handle.release(PROMPT).inputs()))
    two = handle.release([PROMPT, "low"])  # a list is a batch of prompts, each split
    assert [g.units for g in two.guarantees] == [2, 1]
    assert bool(picture(pipe, [PROMPT, "low"], negative_prompt="ugly, and bad").isfinite().all())
    assert len(handle.report().releases) == 2
    rows = handle.release(torch.randn(LENGTH, CHANNELS), groups=torch.arange(LENGTH) // 4)
    assert rows.guarantees[0].units == 4


def test_another_calibration_needs_groups(pipe: Any) -> None:
    calibration = calibration_for(pipe, unit="group", grouping="rows")
    handle = dpx.protect(pipe, CONFIG.replace(unit="group"), calibration=calibration)
    with pytest.raises(dpx.ConfigError, match="groups"):
        picture(pipe, PROMPT)
    assert handle.release(PROMPT, groups="phrases").guarantees[0].units == 2


BAD: dict[str, Any] = {
    "no phrases": [],
    "only commas": " , and ;",
    "an empty one": ["a", " "],
    "a number": ["a", 3],
    "lists": [["a"], ["b"]],
    "too many": ["a"] * (MAX_PHRASES + 1),
    "too many in a text": "a," * (MAX_PHRASES + 1),
    "embeddings": torch.ones(LENGTH, CHANNELS),
    "token ids": torch.tensor([0, 5, 1]),
    "nothing": None,
}


@BOTH
@pytest.mark.parametrize("name", BAD)
def test_phrases_that_cannot_be_released(name: str, pipe: Any, groups: Any) -> None:
    handle = protect(pipe, groups)
    with pytest.raises((ContextError, dpx.ConfigError)):
        handle.release(BAD[name], groups="phrases")
    if isinstance(BAD[name], str) and handle.host.by_phrases:
        with pytest.raises(ContextError):
            picture(pipe, BAD[name])
    assert handle.report().releases == () and handle.ledger.entries() == ()


@pytest.mark.parametrize("unit", ["row", "context"])
def test_phrases_are_for_groups(unit: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private.replace(unit=unit))
    with pytest.raises(dpx.ConfigError, match="group"):
        handle.release(PHRASES, groups="phrases")
    with pytest.raises(dpx.ConfigError, match="phrases"):
        handle.release(PHRASES, groups="words")
    assert handle.ledger.entries() == ()


def test_phrases_need_a_text_encoder(groups: Any) -> None:
    with pytest.raises(ContextError, match="text encoder"):
        dpx.protect(tiny_unet(), groups).release(PHRASES, groups="phrases")


def test_the_report_says_what_phrases_leave_open(pipe: Any) -> None:
    report = str(protect(pipe, CONFIG.replace(unit="group")).report())
    for words in ("commas, semicolons, line breaks", "how many there are", "one by one", "position"):
        assert words in report, words
    pipe = tiny_sd()
    assert "one by one" not in str(protect(pipe, CONFIG).report())
