"""Callbacks within a call: what they may run, and what they may hand back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from hf_dp_xattn.hosts.access import Access
from hf_dp_xattn.hosts.text.closed_callbacks import close_callbacks, closed

NAMES = ["callback_on_step_end", "prior_callback_on_step_end", "prior_callback"]


@pytest.mark.parametrize("kind", ["encoding", "serving"])
@pytest.mark.parametrize("name", NAMES)
def test_callbacks_of_all_names_are_closed(name: str, kind: str) -> None:
    access, seen = Access(), list[bool]()
    arguments: dict[str, Any] = {"kwargs": {name: lambda: seen.append(access.encoding)}, "prompt": "a"}
    close_callbacks(arguments, "kwargs", access.leave)
    with access.enter(kind):
        arguments["kwargs"][name]()
        assert access.encoding
    assert seen == [False]


def run(callback: Any, **given: torch.Tensor) -> Any:
    def apart() -> AbstractContextManager[None]:
        return Access().leave()

    return closed(callback, apart)(None, 0, 0, given)


def embedded() -> torch.Tensor:
    return torch.arange(24.0).reshape(2, 3, 4)


CHANGES: dict[str, Any] = {
    "another tensor": lambda t: torch.zeros_like(t),
    "other rows": lambda t: t.flip(1),
    "another type": lambda t: t.half(),
    "another size": lambda t: t[:, :2],
    "no tensor": lambda t: [t],
}


@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("name", ["prompt_embeds", "add_text_embeds", "text_encoder_hidden_states"])
def test_other_embeddings_are_refused(name: str, change: str) -> None:
    with pytest.raises(dpx.ConfigError, match=name):
        run(lambda pipe, i, t, given: {name: CHANGES[change](given[name])}, **{name: embedded()})


def test_embeddings_that_were_not_given_are_refused() -> None:
    with pytest.raises(dpx.ConfigError, match="prompt_embeds"):
        run(lambda *args: {"prompt_embeds": embedded()}, latents=torch.zeros(1))


@pytest.mark.parametrize("returns", [True, False])
def test_changes_in_place_are_refused(returns: bool) -> None:
    def writes(pipe: Any, i: int, t: Any, given: dict[str, torch.Tensor]) -> Any:
        given["prompt_embeds"].data[1] = 7
        return given if returns else {}

    with pytest.raises(dpx.ConfigError, match="prompt_embeds"):
        run(writes, prompt_embeds=embedded())


@pytest.mark.parametrize("elements", [[0, 1], [1], [1, 1, 0]], ids=str)
def test_whole_batch_elements_may_be_chosen(elements: list[int]) -> None:
    result = run(
        lambda *args: {"prompt_embeds": args[-1]["prompt_embeds"][elements]}, prompt_embeds=embedded()
    )
    assert torch.equal(result["prompt_embeds"], embedded()[elements])


def test_what_is_public_may_be_changed() -> None:
    public = {
        n: torch.ones(2, 3) for n in ("latents", "negative_prompt_embeds", "image_embeds", "add_time_ids")
    }
    result = run(lambda *args: {n: t + 1 for n, t in args[-1].items()}, **public)
    assert all(bool((t == 2).all()) for t in result.values())


class Deceives(dict):  # type: ignore[type-arg]
    """Shows nothing, and gives embeddings when it is asked."""

    def pop(self, name: str, *default: Any) -> Any:
        return embedded() if name == "prompt_embeds" else super().pop(name, *default)


class Lies(torch.Tensor):
    """Is equal to everything."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (
            True
            if function is torch.equal
            else super().__torch_function__(function, kinds, args, kwargs or {})
        )


def test_what_a_callback_holds_is_not_what_is_read() -> None:
    held: list[torch.Tensor] = []

    def holds(pipe: Any, i: int, t: Any, given: dict[str, torch.Tensor]) -> Any:
        held.append(given["prompt_embeds"])
        return Deceives(given)

    tensor = embedded()
    result = run(holds, prompt_embeds=tensor)
    held[0].data.zero_()
    assert result.pop("prompt_embeds") is tensor and torch.equal(tensor, embedded())
    with pytest.raises(dpx.ConfigError, match="prompt_embeds"):
        run(lambda *args: {"prompt_embeds": torch.zeros(2, 3, 4).as_subclass(Lies)}, prompt_embeds=embedded())


def test_something_that_is_no_dict_is_refused() -> None:
    class Pops:
        pop = Deceives.pop

    with pytest.raises(dpx.ConfigError, match="dict"):
        run(lambda *args: Pops(), latents=torch.zeros(1))
    assert closed(lambda i, t, latents: Pops(), Access().leave)(0, 0, torch.zeros(1)) is None
