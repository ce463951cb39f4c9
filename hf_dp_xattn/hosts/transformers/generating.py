"""Arguments of `generate` that no protected model takes, and how they are found."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from ...errors import ConfigError, DPXAttnError

_ASSISTED = "assisted decoding calls the model's parts in ways of its own"
_WITHOUT = "it runs the model without its private context"
REFUSED: dict[str, str] = {
    "assistant_model": _ASSISTED,
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "use_mtp": _ASSISTED,
    "custom_generate": "its code is not known",
    "guidance_scale": _WITHOUT,
    "negative_prompt_ids": _WITHOUT,
    "compile_config": "compiled generation is not supported yet",
    "cache_implementation": "only the dynamic cache is supported yet",
    "prefill_chunk_size": "it cuts inputs in ways of its own",
    "dola_layers": "it reads layers in ways of its own",
}
HARMLESS: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1, 1.0),
    "cache_implementation": (
        "dynamic",
        "hybrid",
    ),  # transformers unsets the second, which Gemma 2 and 3 carry on the Hub
    "use_mtp": (False,),
}


class ThreadCalls(threading.local):
    """The forward that this thread is in; no other thread can see or replace it. generating: `generate` calls it."""

    current: Any = None
    generating: bool = False

    @contextmanager
    def inside_generate(self) -> Iterator[None]:
        before, self.generating = self.generating, True
        try:
            yield
        finally:
            self.generating = before


@contextmanager
def while_protected(check: Callable[[], None]) -> Iterator[None]:
    """A run of `generate` that counts only if the model was protected to its end: one that was unprotected on the way went on with a
    placeholder, or without its private context. Raises ProtectionLostError then. check: of the handle."""
    try:
        yield
    except DPXAttnError:
        raise
    except Exception:
        check()
        raise
    check()


def named_arguments(bound: inspect.BoundArguments) -> dict[str, Any]:
    """All arguments of a call by name, those of `**kwargs` among them."""
    arguments = dict(bound.arguments)
    for kind in bound.signature.parameters.values():
        if kind.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(kind.name, {})
    return arguments


def generation_settings(model: Any, arguments: Mapping[str, Any]) -> Any:
    """The generation config that a call runs with, its own arguments aside: what a config that is passed leaves open, transformers takes
    from the model's.

    Raises:
        ConfigError: what was passed is no generation config.
    """
    passed = arguments.get("generation_config")
    if passed is None:
        return model.generation_config
    if not isinstance(passed, GenerationConfig):
        raise ConfigError("`generation_config` must be a transformers.GenerationConfig; nothing was spent.")
    settings = copy.deepcopy(passed)
    for name, value in model.generation_config.to_dict().items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    return settings


def setting(name: str, arguments: Mapping[str, Any], config: Any) -> Any:
    """Of a call, where it says, else of its generation config."""
    value = arguments.get(name)
    return getattr(config, name, None) if value is None else value


def check_public_ids(name: str, ids: Any, module: Any) -> None:
    """Raises ConfigError for public token ids that the embeddings of `module` would stumble over. Anything but a tensor is left alone."""
    if not isinstance(ids, torch.Tensor):
        return
    size = module.get_input_embeddings().num_embeddings
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{name} must be token ids, integers, got {ids.dtype}. Nothing was run.")
    if bool(((ids < 0) | (ids >= size)).any()):
        raise ConfigError(f"{name} must be token ids of this model, in [0, {size}). Nothing was run.")


def check_last_steps(arguments: Mapping[str, Any], config: Any, size: int) -> None:
    """Raises ConfigError for settings that transformers stumbles over behind the first steps, when a release was charged. size: of the
    vocabulary."""

    def chosen(name: str) -> Any:
        return arguments[name] if name in arguments else getattr(config, name, None)

    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = chosen(name)
        ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise ConfigError(f"{name} must be a token id of this model, in [0, {size}). Nothing was spent.")
    penalty = chosen("exponential_decay_length_penalty")
    if penalty is not None and not (
        isinstance(penalty, (list, tuple))
        and len(penalty) == 2
        and all(isinstance(p, (int, float)) for p in penalty)
    ):
        raise ConfigError(
            "exponential_decay_length_penalty must be two numbers: a position and a factor. Nothing was spent."
        )


def refuse_arguments(
    arguments: Mapping[str, Any],
    config: Any,
    refused: Mapping[str, str],
    harmless: Mapping[str, tuple[Any, ...]],
    switched_off: Collection[str] = (),
) -> None:
    """Raises ConfigError for ways of generating that would go past the release, or that are not supported.

    An argument counts before the generation config. refused: names and reasons. harmless: values that ask for nothing. switched_off: names
    whose value in the generation config is overruled, and not refused.
    """
    for name, reason in refused.items():
        value = arguments.get(name)
        if name not in arguments and name not in switched_off:
            value = getattr(config, name, None)
        if value is not None and value not in harmless.get(name, ()):
            raise ConfigError(f"{name} is not supported on a protected model: {reason}.")
