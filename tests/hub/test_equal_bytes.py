"""With equal noise and equal sums, what is published is equal byte for byte for neighbouring contexts and neighbouring histories.

The list of what is published stands in docs/guarantee.md. What stays with the operator (the local report, the ledger) is not compared.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import hf_dp_xattn as dpx

from .server import FakeHub
from .test_nothing_private_at_rest import logs  # noqa: F401  a fixture
from .worlds import ADD, HOSTS, MECHANISMS, Given, Host, Pair, equal_sums, protected, published, wrong

CASES = [
    pytest.param(name, pair, mechanism, id=f"{name}: {pair}: {mechanism}")
    for name, host in HOSTS.items()
    for pair, what in host.pairs.items()
    for mechanism in MECHANISMS
    if not (mechanism == "dptree" and what.appended)  # it does not grow
    and not (mechanism != "anchors" and name in ("diffusers, response", "diffusers, histogram"))
    and not (name == "diffusers, response" and what.relation == ADD)  # refused by name
]


TRANSPORT = ("http", "urllib3", "filelock")  # times and ports


class World:
    """One run from a fresh hub, log and folder."""

    def __init__(self, folder: Path, hub: FakeHub, log: Any, capfd: Any) -> None:
        self.folder, self.hub, self.log, self.capfd = folder, hub, log, capfd

    def run(
        self, host: Host, mechanism: str, pair: Pair, given: Given, more: Given | None, before: list[Given]
    ) -> dict[str, bytes]:
        host.make()  # what is built once logs once
        ledger = dpx.Ledger()
        for earlier in before:
            protected(host, mechanism, pair, ledger)[1].release(**earlier)
        self.hub.repos.clear()
        self.hub.bodies.clear()
        self.log.clear()
        self.capfd.readouterr()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            own, handle = protected(host, mechanism, pair, ledger)
            blobs = wrong(handle, given)
            release = handle.release(**given)
            if more is not None:
                release.append(**more)
            blobs |= published(host, own, handle, release, self.folder, self.hub)
        blobs["warnings"] = "\n".join(str(w.message) for w in caught).encode()
        blobs["log"] = "\n".join(
            r.getMessage().replace(str(self.folder), "")
            for r in self.log.records
            if not r.name.startswith(TRANSPORT)
        ).encode()
        blobs["stdout"], blobs["stderr"] = (text.encode() for text in self.capfd.readouterr())
        return blobs


@pytest.fixture(autouse=True)
def no_progress_bars() -> Any:
    """They tell times."""
    disable_progress_bar()
    yield
    enable_progress_bar()


@pytest.fixture
def world(tmp_path: Path, hub: FakeHub, logs: Any, capfd: Any) -> Any:  # noqa: F811
    return lambda name: World(tmp_path / name, hub, logs, capfd)


def check_equal(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    assert one.keys() == other.keys() and len(one) > 15
    differ = [name for name in one if one[name] != other[name]]
    assert differ == []


@pytest.mark.parametrize(("host", "pair", "mechanism"), CASES)
def test_neighbouring_contexts(
    host: str, pair: str, mechanism: str, world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    equal_sums(monkeypatch)
    kind, what = HOSTS[host], HOSTS[host].pairs[pair]
    appended = what.appended or (None, None)
    one = world("world").run(kind, mechanism, what, what.one, appended[0], [])
    other = world("world 2").run(kind, mechanism, what, what.other, appended[1], [])
    check_equal(one, other)


def corpus(seeds: list[int]) -> Given:
    """Documents, known by their seeds."""
    drawn = [torch.randint(5, 60, (7,), generator=torch.Generator().manual_seed(s)) for s in seeds]
    return {"input_ids": torch.stack(drawn), "groups": "documents"}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_neighbouring_histories(mechanism: str, world: Any) -> None:
    """The same corpus is released; one of its documents was, or was not, in an earlier corpus of this ledger."""
    kind = HOSTS["encoder-decoder"]
    pair, given = kind.pairs["a document more"], corpus([1, 2, 3])
    one = world("world").run(kind, mechanism, pair, given, None, [corpus([1, 4])])
    other = world("world 2").run(kind, mechanism, pair, given, None, [corpus([5, 4])])
    check_equal(one, other)


def test_a_prompt_that_was_released_before(world: Any) -> None:
    """The same, of phrases that stood in an earlier prompt."""
    kind = HOSTS["diffusers, sum"]
    pair, given = kind.pairs["another phrase"], kind.pairs["another phrase"].one
    earlier = {**given, "context": ["something", "else"]}
    one = world("world").run(kind, "kernel_sum", pair, given, None, [given])
    other = world("world 2").run(kind, "kernel_sum", pair, given, None, [earlier])
    check_equal(one, other)


def test_another_release_is_noticed(world: Any) -> None:
    """Power: with sums as they are, neighbouring contexts differ where the release stands, and only there."""
    kind = HOSTS["diffusers, sum"]
    pair = kind.pairs["a row is another one"]
    one = world("world").run(kind, "kernel_sum", pair, pair.one, None, [])
    other = world("world 2").run(kind, "kernel_sum", pair, pair.other, None, [])
    differ = {name for name in one if one[name] != other[name]}
    assert {"answer", "release/dp_xattn_release.safetensors"} <= differ
    assert not differ & {"release/README.md", "release", "guarantees", "terms", "log", "warnings"}
