"""Bad input: an error of the package's own before anything is spent, and nothing half-patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ContextError

from ..hosts_tiny import CHANNELS, LENGTH, latents, picture, tiny_sd, tiny_unet


def rows(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


def poisoned(value: float) -> torch.Tensor:
    tensor = rows(LENGTH, CHANNELS)
    tensor[3, 5] = value
    return tensor


CONTEXTS: dict[str, Any] = {
    "no prompts": [],
    "None": None,
    "a number": 3,
    "not strings": ["a", 3],
    "bytes": b"a",
    "embeddings [32]": rows(CHANNELS),
    "embeddings [1,1,16,32]": rows(1, 1, LENGTH, CHANNELS),
    "embeddings [16,31]": rows(LENGTH, CHANNELS - 1),
    "embeddings [0,32]": rows(0, CHANNELS),
    "embeddings [1,0,32]": rows(1, 0, CHANNELS),
    "embeddings [0,16,32]": rows(0, LENGTH, CHANNELS),
    "embeddings []": torch.tensor(1.0),
    "embeddings with NaN": poisoned(float("nan")),
    "embeddings with Inf": poisoned(float("inf")),
    "complex embeddings": torch.ones(LENGTH, CHANNELS, dtype=torch.complex64),
    "token ids []": torch.tensor(3),
    "token ids [0]": torch.zeros(0, dtype=torch.long),
    "token ids [17]": torch.zeros(LENGTH + 1, dtype=torch.long),
    "token ids [1,1,4]": torch.zeros(1, 1, 4, dtype=torch.long),
    "negative token ids": torch.tensor([0, -1]),
    "unknown token ids": torch.tensor([0, 256]),
    "another first token": torch.tensor([5, 6, 1]),
    "booleans": torch.ones(4, dtype=torch.bool),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_that_cannot_be_released(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with pytest.raises((ContextError, dpx.ConfigError)):
        handle.release(CONTEXTS[name])
    assert handle.report().releases == () and handle.ledger.entries() == ()
    handle.release("a good one")


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "embeds [16,32]": lambda: {"prompt_embeds": rows(LENGTH, CHANNELS)},
    "embeds [1,16,31]": lambda: {"prompt_embeds": rows(1, LENGTH, CHANNELS - 1)},
    "embeds [1,0,32]": lambda: {"prompt_embeds": rows(1, 0, CHANNELS)},
    "embeds with NaN": lambda: {"prompt_embeds": poisoned(float("nan")).unsqueeze(0)},
    "embeds as a list": lambda: {"prompt_embeds": [[1.0]]},
    "prompt and embeds": lambda: {"prompt": "a", "prompt_embeds": rows(1, LENGTH, CHANNELS)},
    "empty list": lambda: {"prompt": []},
    "a number": lambda: {"prompt": 3},
    "list with a number": lambda: {"prompt": ["a", 3]},
    "three negative prompts": lambda: {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"]},
    "negative number": lambda: {"prompt": "a", "negative_prompt": 3},
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with pytest.raises((ContextError, dpx.ConfigError)):
        picture(pipe, **CALLS[name]())
    assert handle.report().releases == () and handle.ledger.entries() == ()
    assert bool(picture(pipe, "a good one").isfinite().all())


def test_neither_prompt_nor_embeds(pipe: Any, private: Any) -> None:
    dpx.protect(pipe, private)
    with pytest.raises(ValueError, match="Provide either"):
        picture(pipe)


@pytest.mark.parametrize("batch", [0, 1], ids=["placeholder first", "embeddings first"])
def test_placeholders_and_embeddings_in_one_batch(batch: int, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    marks = handle.release("a").inputs()["prompt_embeds"]
    parts = [marks, rows(1, LENGTH, CHANNELS)]
    with pytest.raises(dpx.ConfigError, match="mixes"):
        picture(pipe, prompt_embeds=torch.cat(parts if batch == 0 else parts[::-1]))


def test_a_placeholder_is_not_a_context(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    marks = handle.release("a").inputs()["prompt_embeds"]
    with pytest.raises(ContextError, match="placeholder"):
        handle.release(marks)


def test_text_needs_a_text_encoder(private: Any) -> None:
    handle = dpx.protect(tiny_unet(), private)
    for context in ("a", ["a"], torch.tensor([0, 1])):
        with pytest.raises(ContextError, match="text encoder"):
            handle.release(context)
    release = handle.release(rows(LENGTH, CHANNELS))
    with pytest.raises(dpx.ConfigError, match="text encoder"):
        release.inputs(prompt="a")


@pytest.mark.parametrize("prompt", [["a", "b", "c"], [], 3, [3]], ids=str)
def test_public_prompts_that_do_not_fit(prompt: Any, pipe: Any, private: Any) -> None:
    release = dpx.protect(pipe, private).release(["x", "y"])
    with pytest.raises(dpx.ConfigError):
        release.inputs(prompt=prompt)


def test_contexts_of_unlike_length_in_one_batch(private: Any) -> None:
    unet = tiny_unet()
    handle = dpx.protect(unet, private)
    parts = handle.release(rows(4, CHANNELS)).contexts + handle.release(rows(5, CHANNELS)).contexts
    with pytest.raises(dpx.ReleaseError, match="lengths"):
        dpx.Release(parts, private, handle).inputs()


GROUPS = {
    "none": None,
    "3": torch.zeros(3).long(),
    "floats": torch.zeros(16),
    "rank 2": torch.zeros(2, 15).long(),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_that_do_not_fit(name: str, pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private.replace(unit="group"))
    with pytest.raises((dpx.ConfigError, ContextError)):
        handle.release("a", groups=GROUPS[name])
    with pytest.raises((dpx.ConfigError, ContextError)):
        picture(pipe, "a")
    assert handle.ledger.entries() == ()


def test_groups_for_another_unit(pipe: Any, private: Any) -> None:
    handle = dpx.protect(pipe, private)
    with pytest.raises(dpx.ConfigError, match="group"):
        handle.release("a", groups=torch.zeros(LENGTH, dtype=torch.long))
    assert handle.ledger.entries() == ()


@pytest.mark.parametrize("config", [{}, "anchors", dpx.DPXAttnConfig], ids=str)
def test_something_else_for_a_config(config: Any, pipe: Any) -> None:
    with pytest.raises(dpx.ConfigError, match="DPXAttnConfig"):
        dpx.protect(pipe, config)
    assert vars(pipe.unet).keys().isdisjoint({"_dp_xattn_handle"})


def test_missing_encoder_hidden_states(private: Any) -> None:
    unet = tiny_unet()
    dpx.protect(unet, private)
    with pytest.raises(dpx.ProtectionLostError):
        unet(latents(), 5, None)


@pytest.mark.parametrize("unit", ["row", "context"])
def test_units(unit: str, private: Any) -> None:
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private.replace(unit=unit))
    assert bool(picture(pipe, "a red circle").isfinite().all())
    assert handle.report().releases[0]["unit"] == unit


@pytest.mark.parametrize("length", [15, 16])
def test_groups(length: int, private: Any) -> None:
    """Groups of all rows, or of the private ones."""
    pipe = tiny_sd()
    handle = dpx.protect(pipe, private.replace(unit="group"))
    release = handle.release("a red circle", groups=torch.arange(length) // 4)
    assert bool(picture(pipe, **release.inputs()).isfinite().all())
    assert release.guarantees[0].units == 4
