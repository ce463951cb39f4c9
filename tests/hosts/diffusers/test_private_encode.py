"""Weighted private text: opaque in the caller's hands, released as rows that are weighted as compel does, charged as its text."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.audit.leaks import held_fixed
from hf_dp_xattn.hosts.private_encoding import PrivateEncoding, row_weights, token_counts

from ...hosts_tiny import picture, tiny_sd, tiny_sdxl, tiny_unet
from ..text.libraries import library
from ..text.pipelines import tiny_flux, tiny_pixart
from .test_placed_prompts import protect

PARTS = ["a", ("red", 1.3), "box", ("not", 0.0)]
TEXT, RED, NOT = "a red box not", slice(2, 5), slice(8, 11)  # of a tokenizer of letters, behind its start
KINDS: dict[str, Callable[[], Any]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}


def _rows(pipe: Any, text: str) -> torch.Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(
            text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]


def _by_hand(pipe: Any) -> torch.Tensor:
    """Rows [1, n, C], of an unprotected pipeline."""
    rows, empty = _rows(pipe, TEXT), _rows(pipe, "")
    made = rows.clone()
    made[:, RED] = empty[:, RED] + 1.3 * (rows - empty)[:, RED]
    made[:, NOT] = empty[:, NOT]
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_weighted_as_by_hand(kind: str) -> None:
    pipe = KINDS[kind]()
    rows, plain = _by_hand(pipe), _rows(pipe, TEXT)
    handle = protect(pipe)
    release = handle.release(handle.private_encode(PARTS))
    drawn = picture(pipe, **release.inputs())
    assert torch.allclose(drawn, picture(pipe, **handle.release(rows).inputs()), atol=1e-4)
    assert not torch.allclose(drawn, picture(pipe, **handle.release(plain).inputs()), atol=1e-4)
    same = handle.private_encode(["a", ("red", 1), "box", "not"])
    assert torch.equal(picture(pipe, TEXT), picture(pipe, **handle.release(same).inputs()))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_encoded_apart_where_they_are_units(kind: str) -> None:
    pipe = KINDS[kind]()
    rows, empty = _rows(pipe, "blue dogs")[0], _rows(pipe, "")[0]
    dim = (empty + 0.5 * (rows - empty))[1:]
    want = torch.cat([_rows(pipe, "red box")[0, 1:], dim])
    handle = protect(pipe, unit="group")
    named = handle.host.weighted(["red box", "blue dogs"], [1.0, 0.5])
    assert torch.allclose(named.load()[0], want, atol=1e-5) and len(torch.unique(named.phrases)) == 2
    release = handle.release(handle.private_encode(["red box", ("blue dogs", 0.5)]))
    assert bool(picture(pipe, **release.inputs()).isfinite().all())


READS: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda e: e.tensor,
    "data": lambda e: e.data,
    "vars": vars,
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "json": json.dumps,
    "save": lambda e: torch.save(e, "/dev/null"),
    "add": lambda e: e + e,
    "multiply": lambda e: 2 * e,
    "index": lambda e: e[0],
    "iterate": list,
    "length": len,
    "number": float,
    "torch.add": lambda e: torch.add(torch.ones(1), e),
    "torch.cat": lambda e: torch.cat([e, e]),
    "torch.sum": torch.sum,
    "torch.tensor": torch.tensor,
    "numpy": lambda e: np.asarray(e, dtype=float),
    "set": lambda e: setattr(e, "x", 1),
    "write": lambda e: e.__setstate__({}),
}


@pytest.mark.parametrize("how", READS)
def test_nothing_else_reads_it(how: str) -> None:
    encoding = protect(tiny_sd()).private_encode([("Zanzibar", 1.3), "code"])
    with pytest.raises((dpx.ContextError, TypeError, AttributeError, RuntimeError)) as refused:
        READS[how](encoding)
    assert "Zanz" not in str(refused.value)


def test_it_is_not_shown() -> None:
    handle = protect(tiny_sd())
    encoding = handle.private_encode([("Zanzibar", 1.3), "code"])
    assert isinstance(encoding, PrivateEncoding)
    for text in (
        str(encoding),
        repr(encoding),
        f"{encoding}",
        str(dir(encoding)),
        repr([encoding]),
    ):
        assert "Zanz" not in text and "1.3" not in text
    assert not hasattr(encoding, "shape") and not isinstance(encoding, torch.Tensor)
    assert "Zanz" not in str(handle.report())


def test_nothing_is_computed_or_spent_before_its_release() -> None:
    pipe = tiny_sd()
    handle, calls = protect(pipe, "kernel_sum"), []
    hook = pipe.text_encoder.register_forward_hook(lambda *given: calls.append(1))
    encoding = handle.private_encode(PARTS)
    assert not calls and not handle.report().releases
    handle.release(encoding)
    assert calls and len(handle.report().releases) == 1
    hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_other_weights_are_no_other_text(kind: str) -> None:
    handle = protect(KINDS[kind](), "kernel_sum")
    one = handle.release(handle.private_encode(PARTS))
    again = handle.release(handle.private_encode(PARTS))
    assert one.contexts[0].tag == again.contexts[0].tag and len(handle.report().releases) == 1
    for other in (TEXT, handle.private_encode(["a", ("red", 1.2), "box not"])):
        with pytest.raises(dpx.BudgetExceededError):
            handle.release(other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["row", "group"])
def test_pictures_depend_on_the_release_alone(kind: str, unit: str) -> None:
    pipe = KINDS[kind]()
    handle = protect(pipe, "kernel_sum", unit=unit)
    with held_fixed(handle):
        pictures = [
            picture(pipe, **handle.release(handle.private_encode(parts)).inputs())
            for parts in ([("red", 1.3), "box"], ["blue dogs", ("run", 0.4)])
        ]
    assert torch.equal(*pictures)


WRONG: dict[str, Any] = {
    "a string": "a (red)1.3 box",
    "none": [],
    "a word for a weight": [("red", "1.3")],
    "no finite weight": [("red", float("nan"))],
    "a bool": [("red", True)],
    "a number": [1.3],
    "three": [("red", 1.0, 2)],
    "an empty text": [("", 1.3)],
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_parts_are_refused(what: str) -> None:
    handle = protect(tiny_sd())
    with pytest.raises((dpx.ConfigError, dpx.ContextError), match="othing was spent"):
        handle.private_encode(WRONG[what])
    assert not handle.report().releases


@pytest.mark.parametrize("make", [tiny_flux, tiny_pixart, tiny_unet])
def test_hosts_without_rows_of_tokens_refuse(make: Callable[[], Any]) -> None:
    with pytest.raises((dpx.ConfigError, dpx.ContextError)):
        protect(make()).private_encode(PARTS)


def test_released_text_needs_no_weights() -> None:
    pipe = tiny_sd()
    config = dpx.DPXAttnConfig(mechanism="library", unit="group")
    handle = dpx.protect(pipe, config, calibration=library(pipe), ledger=dpx.Ledger())
    with pytest.raises(dpx.ConfigError, match="is public: weight it"):
        handle.private_encode(PARTS)


def test_it_is_of_one_handle_and_goes_nowhere_else() -> None:
    pipe = tiny_sd()
    handle, other = protect(pipe), protect(tiny_sd())
    encoding = handle.private_encode(PARTS)
    with pytest.raises(dpx.ContextError, match="another protected host"):
        other.release(encoding)
    with pytest.raises(dpx.ConfigError):
        handle.release(encoding, groups="phrases")
    for given in ({"prompt_embeds": encoding}, {"prompt": encoding}, {"prompt": [encoding]}):
        with pytest.raises((dpx.DPXAttnError, ValueError)):
            picture(pipe, **given)
    assert not handle.report().releases


def test_tokens_of_parts() -> None:
    words: dict[str, int] = {}

    def tokens(text: str) -> list[int]:
        return [0, *(words.setdefault(w, 2 + len(words)) for w in text.split()), 1]

    assert token_counts(tokens, ["a b", "c"]) == ([2, 3], 1)
    assert token_counts(lambda text: tokens(text)[1:], ["a", "b c"]) == ([1, 3], 0)
    assert token_counts(lambda text: tokens(text)[1:-1], ["a", "b"]) == ([1, 2], 0)
    made = row_weights([2, 3], [1.5, 0.5], start=1, rows=6)
    assert made.tolist() == [1, 1.5, 1.5, 0.5, 1, 1]
    assert row_weights([2, 9], [1.5, 0.5], start=1, rows=5).tolist() == [1, 1.5, 1.5, 0.5, 0.5]
    with pytest.raises(dpx.ConfigError, match="whole words"):
        token_counts(lambda text: [ord(text[-1])] if text else [], ["a", "b"])
