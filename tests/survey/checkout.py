"""The tiny pipelines that diffusers' own tests build, out of a checkout of its repository (the package itself does not carry them)."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "diffusers_tests"
DECORATORS = ("parameterized", "requests_mock")  # packages that only the tests themselves need


@dataclass(frozen=True)
class Case:
    """One pipeline. name: of the class of tests that builds it. host: of its own class. make: a fresh one. inputs: of a call."""

    name: str
    host: str
    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]


def load(folder: Path) -> None:
    """Makes the folder `tests` of a checkout importable, under a name that is not that of our own tests."""
    package = types.ModuleType(NAME)
    package.__path__ = [str(folder / "tests")]
    sys.modules[NAME] = package
    for name in DECORATORS:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = decorators(name)
    for name in ("testing_utils", "others", "pipelines", "models"):  # as some of them call these
        sys.modules[f"tests.{name}"] = importlib.import_module(f"{NAME}.{name}")


def decorators(name: str) -> types.ModuleType:
    """A stand-in for a package that decorates or feeds tests, which are not run here."""

    def decorate(*args: Any, **kwargs: Any) -> Any:
        return lambda function: function

    decorate.expand = decorate  # type: ignore[attr-defined]
    made = types.ModuleType(name)
    made.parameterized = made.parameterized_class = decorate  # type: ignore[attr-defined]
    return made


def modules(folder: Path) -> list[str]:
    found = sorted((folder / "tests" / "pipelines").rglob("test_*.py"))
    return [
        ".".join((NAME, *f.relative_to(folder / "tests").with_suffix("").parts))
        for f in found
        if "get_dummy_components" in f.read_text(encoding="utf-8")
    ]


def cases(module_name: str) -> Iterator[Case]:
    """Those of one file of tests."""
    module = importlib.import_module(module_name)
    for name, cls in vars(module).items():
        if not isinstance(cls, type) or cls.__module__ != module_name:
            continue
        pipeline = getattr(cls, "pipeline_class", None)
        if not isinstance(pipeline, type) or not callable(getattr(cls, "get_dummy_components", None)):
            continue
        if not callable(getattr(cls, "get_dummy_inputs", None)):
            continue
        yield Case(name, _host(pipeline), _make(cls, pipeline), _inputs(cls))


def _host(pipeline: type) -> str:
    """The name of the class of diffusers, which some tests wrap."""
    return next(c.__name__ for c in pipeline.__mro__ if c.__module__.startswith("diffusers."))


def _make(cls: type, pipeline: type) -> Callable[[], Any]:
    return lambda: pipeline(**_instance(cls).get_dummy_components())


def _inputs(cls: type) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        test = _instance(cls)
        takes = inspect.signature(test.get_dummy_inputs).parameters
        return dict(test.get_dummy_inputs("cpu") if "device" in takes else test.get_dummy_inputs())

    return make


def _instance(cls: type) -> Any:
    made = cls.__new__(cls)
    if "setUp" in vars(cls):  # it patches what its pipeline needs
        made.setUp()
    return made
