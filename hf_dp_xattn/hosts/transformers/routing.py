"""Routing the attention of a transformers model's modules to a function of ours, by configs of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Routing:
    """The attention function, the name that it is registered under, and the attribute that tells a module its layer."""

    name: str
    attribute: str
    function: Callable[..., Any]


def route(config: Any, name: str) -> Any:
    """A copy of a module's config that names another attention function; the host's own config, and so its masks, stay as they are."""
    config = copy.copy(config)
    config._attn_implementation_internal = name
    return config


@contextmanager
def routed(modules: Iterable[nn.Module], name: str) -> Iterator[None]:
    """While it lasts, these modules' attention goes to the function of that name."""
    before: list[tuple[Any, Any]] = [(m, m.config) for m in modules]
    for module, config in before:
        module.config = route(config, name)
    try:
        yield
    finally:
        for module, config in before:
            module.config = config
