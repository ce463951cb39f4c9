"""The first two steps of a `generate` on zeros in the place of a context that is to be released: what fails whatever the context holds
fails before the charge.

Transformers checks most arguments before its first forward. Not token ids that the decoder does not know, nor what logits processors do
with the first scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from ....errors import ConfigError, DPXAttnError
from .cross_attention import DryRunOver

_OWN = {
    "logits_processor": 2,
    "stopping_criteria": 2,
}  # the caller's own code, and how many arguments it is given


class _Silent:
    """A streamer to nowhere."""

    def put(self, value: Any) -> None:
        pass

    def end(self) -> None:
        pass


def dry_run(
    public: AbstractContextManager[None],
    steps: AbstractContextManager[None],
    device: torch.device,
    original: Callable[..., Any],
    arguments: Mapping[str, Any],
    stand_in: Mapping[str, Any],
) -> None:
    """Runs `original` for so many steps, and what comes before the next one. Code of the caller's own is looked at and not run: it
    may count its calls.

    Args:
        public: permission to run without a release.
        steps: what ends the run (`Calls.at_most`).
        device: of the model, whose random state is left as it was.
        stand_in: zeros, as the encoder's output or what else takes the context's place.

    Raises:
        ConfigError: these arguments fail. Nothing was spent.
    """
    trial = dict(arguments)
    for name, count in _OWN.items():
        _check_callables(name, trial.get(name), count)
        trial.pop(name, None)
    _check_stepwise(trial)
    trial.pop("prefix_allowed_tokens_fn", None)
    if trial.get("streamer") is not None:
        trial["streamer"] = _Silent()
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            public,
            steps,
        ):
            original(**trial, **stand_in)
    except DryRunOver:
        pass
    except DPXAttnError:
        raise
    except Exception as error:  # its words are of public arguments and zeros
        raise ConfigError(
            f"generate cannot run with these arguments ({type(error).__name__}: {error}). Nothing was released or spent."
        ) from error


def _check_stepwise(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError where a streamer or a function of allowed tokens could not be called."""
    streamer, allowed = arguments.get("streamer"), arguments.get("prefix_allowed_tokens_fn")
    if streamer is not None and not all(callable(getattr(streamer, n, None)) for n in ("put", "end")):
        raise ConfigError(
            "`streamer` must have put and end, as transformers' streamers do; nothing was spent."
        )
    if allowed is not None:
        _check_callables("prefix_allowed_tokens_fn", [allowed], 2)


def _check_callables(name: str, functions: Any, count: int) -> None:
    """Raises ConfigError unless it is None or a list of functions of so many arguments."""
    if functions is None:
        return
    if not isinstance(functions, Iterable):
        raise ConfigError(f"`{name}` must be a list; nothing was spent.")
    for function in functions:
        if not callable(function) or not _takes(function, count):
            raise ConfigError(
                f"`{name}` holds a {type(function).__name__}, which cannot be called with {count} arguments; nothing was spent."
            )


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # of compiled code
    try:
        signature.bind_partial(*[None] * count)
    except TypeError:
        return False
    return True
