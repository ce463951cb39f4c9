"""Two private prompts, one release, equal bytes everywhere: some pipelines in `make test`, all that diffusers' own tests build in
`make test-slow`; and leaks that the survey finds."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_dp_xattn.hosts.text import prompt_swap

from ..hosts.text.pipelines import PIPELINES, options
from . import checkout
from .findings import NOT_RUN, WORKS, NotBuilt
from .pipelines import SECRETS, build, how, probe
from .stand_ins import no_downloads
from .tables import load

SOURCE = os.environ.get("DIFFUSERS_SOURCE", "")


def case(kind: str) -> checkout.Case:
    make = PIPELINES[kind]
    return checkout.Case(kind, kind, make, lambda: options(make()))


@pytest.mark.parametrize("kind", PIPELINES)
def test_only_the_release_reaches_a_pipeline(kind: str) -> None:
    own = case(kind)
    assert how("library", own, build(own)) == WORKS


def _leak(change: Callable[[str, str], str]) -> Any:
    """`PromptSwap._swap` with released texts that are changed by the private ones."""
    original = prompt_swap.PromptSwap._swap

    def swap(self: Any, call: Any, bound: inspect.BoundArguments) -> None:
        secret = bound.arguments["prompt"]
        original(self, call, bound)
        bound.arguments["prompt"] = change(bound.arguments["prompt"], secret)

    return swap


LEAKS = {
    "the text": lambda released, secret: secret,
    "its first word": lambda released, secret: f"{released} {secret.split()[0]}",
    "its length": lambda released, secret: released + " x" * (len(secret) // 20),
    "to the log": lambda released, secret: print(secret) or released,
}


@pytest.mark.parametrize("what", LEAKS)
def test_a_leak_is_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_swap.PromptSwap, "_swap", _leak(LEAKS[what]))
    own = case("sd")
    found = how("library", own, build(own))
    assert found.startswith("LEAKS") and not any(word in found for word in SECRETS[0].split())


def test_an_argument_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_swap, "PRIVATE", re.compile("prompt"))
    monkeypatch.setattr(prompt_swap, "check_texts", lambda *arguments: None)
    make = PIPELINES["sdxl"]
    own = checkout.Case("sdxl", "sdxl", make, lambda: {**options(make()), "prompt_2": "a dog"})
    assert how("library", own, build(own)).startswith("LEAKS")


@pytest.mark.slow
@pytest.mark.skipif(
    not SOURCE, reason="set DIFFUSERS_SOURCE to a checkout of diffusers: its tests build the pipelines"
)
def test_every_pipeline_does_what_the_page_says() -> None:
    checkout.load(Path(SOURCE))
    known, seen, other = load("pipelines")["found"], set(), {}
    with no_downloads():
        for module in checkout.modules(Path(SOURCE)):
            try:
                cases = list(checkout.cases(module))
            except ImportError:
                continue
            for own in cases:
                if own.host in seen:
                    continue
                try:
                    found = probe(own)
                except NotBuilt:
                    continue
                seen.add(own.host)
                page = {m: h for m, h in known.get(own.host, {"how": {}})["how"].items() if h != NOT_RUN}
                if any(found.how[m] != h for m, h in page.items()):
                    other[own.host] = found.how
    assert not other and len(seen) > 100
