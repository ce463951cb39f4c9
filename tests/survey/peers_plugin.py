"""A plugin of pytest for diffusers' own tests: nothing is downloaded, each pipeline is protected before its first call where that is asked
for, and what came out of each test is written to a file. `peers.py` passes it what it needs by the environment."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import warnings
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import diffusers
import pytest
from diffusers import DiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig

import hf_dp_xattn as dpx
import tests
from hf_dp_xattn.hosts.text.prompt_swap import takes_prompt

from .checkout import DECORATORS, decorators
from .stand_ins import no_downloads

SOURCE, OUT, PROTECTED, ONLY = "DIFFUSERS_SOURCE", "PEERS_OUT", "PEERS_PROTECTED", "PEERS_ONLY"
PASSED = "passed"
NARROW, WIDE = 8, 32
_outcomes: dict[str, str] = {}
_stack = ExitStack()

if SOURCE in os.environ:  # theirs is a package of this name too, and its files import each other
    tests.__path__.insert(0, str(Path(os.environ[SOURCE]) / "tests"))
    for name in DECORATORS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = decorators(name)


def pytest_configure(config: pytest.Config) -> None:
    _stack.enter_context(no_downloads())
    widen()
    if os.environ.get(PROTECTED):
        protect_calls()


def pytest_unconfigure(config: pytest.Config) -> None:
    _stack.close()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get(ONLY):
        wanted = set(json.loads(Path(os.environ[ONLY]).read_text(encoding="utf-8")))
        items[:] = [item for item in items if item.nodeid in wanted]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        _outcomes[report.nodeid] = crash.message if crash is not None else str(report.longrepr)[:300]
    elif report.when == "call" and report.passed:
        _outcomes.setdefault(report.nodeid, PASSED)


def pytest_sessionfinish(session: pytest.Session) -> None:
    Path(os.environ[OUT]).write_text(json.dumps(_outcomes, indent=1, sort_keys=True), encoding="utf-8")


def widen() -> None:
    """Tiny models whose text has 8 channels get 32, unprotected and protected: a release is named in the first 15 of a row, and each real
    model has more."""
    for cls, name in ((UNet2DConditionModel, "cross_attention_dim"), (CLIPTextConfig, "hidden_size")):
        _widen(cls, name)


def _widen(cls: Any, name: str) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get(name) == NARROW:
            kwargs[name] = WIDE
        original(self, *args, **kwargs)

    cls.__init__ = init


def protect_calls() -> None:
    """From now on each pipeline that takes a prompt is protected with `mechanism="none"` when it is called first."""
    for cls in [getattr(diffusers, n) for n in dir(diffusers) if n.endswith("Pipeline")]:
        known = isinstance(cls, type) and issubclass(cls, DiffusionPipeline) and "__call__" in vars(cls)
        if known and takes_prompt(cls):
            _wrap(cls)


_protected: weakref.WeakSet[Any] = weakref.WeakSet()


def _wrap(cls: Any) -> None:
    original = cls.__call__

    @functools.wraps(original)
    def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        if pipe in _protected:
            return original(pipe, *args, **kwargs)
        for other in list(_protected):  # a test may make a second pipeline of the first one's parts
            dpx.unprotect(other)
            _protected.discard(other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dpx.protect(
                pipe,
                dpx.DPXAttnConfig(unit="row", mechanism="none"),
                budget=dpx.Budget(1e6, 0.5),  # a change of weights asks for another release
                ledger=dpx.Ledger(),
            )
        _protected.add(pipe)
        return pipe(*args, **kwargs)  # of the class that it has now

    cls.__call__ = call
