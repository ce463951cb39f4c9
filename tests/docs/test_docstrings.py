"""Public docstrings: each public name has an example that runs, and each argument a line of its own."""

from __future__ import annotations

import doctest
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_dp_xattn as dpx
from tests.hosts.transformers.decoder_only.test_chat import tokenizer
from tests.hosts_tiny import tiny_sd

pytestmark = pytest.mark.as_users
ROOT = Path(__file__).resolve().parents[2]
PUBLIC = [name for name in dpx.__all__ if name != "__version__"]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def namespace() -> dict[str, Any]:
    """What the examples take for granted: a pipeline, a library for it, a calibration of another one, a chat tokenizer."""
    pipe = tiny_sd()
    public = ["a red circle", "a blue star, pink background", "a red star", "a blue circle, black background"]
    return {
        "dpx": dpx,
        "torch": torch,
        "warnings": warnings,
        "pipe": pipe,
        "library": dpx.calibrate(pipe, public, epsilons=(4.0, 8.0), progress=False),
        "calibration": str(ROOT / "examples/shapes/calibrations/row"),
        "tokenizer": tokenizer(),
        "messages": MESSAGES,
    }


def failures(example: str, name: str) -> list[str]:
    """What of an example came out otherwise than it says."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(example, namespace(), name, None, 0)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    runner.run(test, out=said.append)
    return said


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documented = inspect.getdoc(getattr(dpx, name)) or ""
    assert ">>>" in documented, "it has no example"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No calibration")
        assert not failures(documented, name)


def test_an_example_that_is_wrong_is_caught() -> None:
    assert failures(">>> dpx.Budget(8.0, 1e-5).epsilon\n4.0\n", "planted")
    assert failures(">>> dpx.Budget(-1.0, 1e-5)\n", "planted")


def callables() -> Iterator[tuple[str, Any]]:
    for name in PUBLIC:
        public = getattr(dpx, name)
        if inspect.isclass(public) and issubclass(public, (Exception, Warning)):
            continue
        yield name, public
        if inspect.isclass(public):
            for key in vars(public):
                if not key.startswith("_") and inspect.isroutine(getattr(public, key)):
                    yield f"{name}.{key}", getattr(public, key)


def unexplained(documented: str, parameters: list[str]) -> list[str]:
    """Parameters without a line of their own."""
    return [p for p in parameters if not re.search(rf"^\s+{p}:", documented, flags=re.M)]


@pytest.mark.parametrize(("name", "public"), callables(), ids=[name for name, _ in callables()])
def test_each_argument_has_a_line(name: str, public: Any) -> None:
    helped = {k for k, f in getattr(public, "__dataclass_fields__", {}).items() if "help" in f.metadata}
    parameters = [
        p for p in inspect.signature(public).parameters if p not in helped and not p.startswith("_")
    ]
    parameters = [p for p in parameters if p not in ("self", "cls")]
    assert not unexplained(inspect.getdoc(public) or "", parameters)


def test_two_arguments_in_one_line_are_caught() -> None:
    assert unexplained("Does it.\n\nArgs:\n    a, b: numbers.", ["a", "b"]) == ["a", "b"]
    assert unexplained("Does it.\n\nArgs:\n    a: one. b: two.", ["a", "b"]) == ["b"]
