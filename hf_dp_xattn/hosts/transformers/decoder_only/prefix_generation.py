"""`generate` of a protected decoder-only model, shadowed by an instance attribute: it runs with a release's inputs, or not at all."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from ....errors import ConfigError, ProtectionLostError
from ...guard import Guard
from ...shadows import Shadows
from .. import generating
from ..generating import generation_settings, named_arguments, refuse_arguments, setting, while_protected
from .prefix_attention import Calls, check_window
from .prefix_cache import PrefixCache

NO_INPUTS = (
    "This model is protected and was called without a release. Call model.generate(**release.inputs(input_ids=ids)), or declare everything "
    "public with `with protected.public():`."
)
PROMPT_LEARNING = (
    "PEFT's prompt learning (prompt, prefix or p-tuning) is not supported around a protected model: its virtual tokens would be left out, "
    "and the user's tokens too. Call generate of the protected model itself, or train what lives in the weights (LoRA is supported)."
)
REFUSED: dict[str, str] = {
    **generating.REFUSED,
    "inputs_embeds": "pass token ids",
    "position_ids": "positions are counted from the release's public length",
    "token_type_ids": "they change which tokens see each other",
    "penalty_alpha": "contrastive search splits caches in ways of its own",
}
HARMLESS: dict[str, tuple[Any, ...]] = {**generating.HARMLESS, "penalty_alpha": (0, 0.0)}
REFUSED_IN_CALLS = (
    "position_ids",
    "token_type_ids",
)  # of a direct call; `generate` counts positions as the model does
# settings that would mean the prefix's tokens as well, and the values that ask for nothing
BLIND: dict[str, tuple[Any, ...]] = {
    "max_length": (),
    "min_length": (0,),
    "repetition_penalty": (1, 1.0),
    "no_repeat_ngram_size": (0,),
}


def infer_mask(model: Any, ids: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """[B, m] for ids [B, m] that came without a mask, as the unprotected model's `generate` infers it: pads are left out where the model
    has a pad token that ends no reply.

    options: of `generate`, as far as they are known: pad_token_id, eos_token_id, generation_config count before the model's own.
    """

    def asked(name: str) -> list[int]:
        configs = (options.get("generation_config"), getattr(model, "generation_config", None))
        for value in (options.get(name), *(getattr(config, name, None) for config in configs)):
            if value is not None:
                return torch.as_tensor(value).flatten().tolist()
        return []

    pad = asked("pad_token_id")
    if not pad or pad[0] in asked("eos_token_id"):
        return torch.ones_like(ids)
    return ids.ne(pad[0]).to(ids)


class GeneratesBehindPrefix(Protocol):
    """What `generate` asks of the host. limit: positions that the layers see at once. serve: makes a cache's release readable."""

    guard: Guard

    @property
    def model(self) -> Any: ...
    @property
    def calls(self) -> Calls: ...
    @property
    def limit(self) -> int | None: ...
    def serve(self, cache: PrefixCache) -> Any: ...


class GenerateShadow(Shadows):
    """Stands in for `model.generate` and `model.generate_batch` while the model is protected."""

    def __init__(self, host: GeneratesBehindPrefix) -> None:
        super().__init__(host.model, {"generate": self._generate, "generate_batch": self._generate_batch})
        self._host = host
        self._warned = False

    def _generate_batch(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        raise ConfigError(
            "Continuous batching (generate_batch) keeps a paged cache of its own, which cannot hold a release, and runs in a thread of its "
            "own, where no `public()` holds. Call model.generate, also with public text."
        )

    def _generate(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._host.guard.check_thoroughly()
        arguments = named_arguments(bound)
        cache = arguments.get("past_key_values")
        if not isinstance(cache, PrefixCache):
            if self._host.guard.access.public:
                return original(*bound.args, **bound.kwargs)
            raise ProtectionLostError(NO_INPUTS)
        config = generation_settings(self._model, arguments)
        self._check(arguments, config)
        prepare = self._model.__dict__.get(
            "prepare_inputs_for_generation"
        )  # PEFT's wrappers put their own there
        wrapped = getattr(getattr(prepare, "__self__", None), "active_peft_config", None)
        if getattr(wrapped, "is_prompt_learning", False):
            raise ProtectionLostError(PROMPT_LEARNING)
        ids = arguments.get("input_ids", arguments.get("inputs"))
        mask = arguments.get("attention_mask")
        if ids is None or mask is None or mask.shape[-1] != cache.offset + cache.suffix + ids.shape[-1]:
            raise ConfigError(
                "generate needs input_ids, attention_mask and past_key_values as release.inputs(input_ids=..., attention_mask=...) gives "
                "them. For a further turn, call release.inputs with all token ids of the conversation."
            )
        self._host.serve(cache)
        check_window(self._host.limit, cache.offset + cache.suffix + self._planned(arguments, config, ids))
        self._warn_once(arguments, config)
        cache = cache.fork()  # so that the same inputs can be used again
        cache.elastic, cache.expected = True, int(ids.shape[-1])
        arguments["cache_implementation"] = (
            None  # a dynamic one, as here: transformers refuses its name beside a cache
        )
        with while_protected(self._host.guard.check), self._host.calls.inside_generate():
            return original(**{**arguments, "past_key_values": cache})

    def _warn_once(self, arguments: dict[str, Any], config: Any) -> None:
        """Settings that mean all tokens so far see those of the prefix in no protected model; once for each model."""
        blind = [n for n, nothing in BLIND.items() if setting(n, arguments, config) not in (None, *nothing)]
        if "max_length" in blind and setting("max_new_tokens", arguments, config) is not None:
            blind.remove("max_length")
        if blind and not self._warned:
            self._warned = True
            warnings.warn(
                f"{', '.join(blind)}: the private prefix is not among the tokens that these see. max_length and min_length count the "
                "user's own tokens and the reply (max_new_tokens and min_new_tokens say what is meant), and no word of the prefix counts "
                "as a repetition.",
                stacklevel=4,
            )

    @staticmethod
    def _planned(arguments: dict[str, Any], config: Any, ids: Any) -> int:
        """Own tokens after the longest generation that is asked for; the last one is never fed back."""
        n = int(ids.shape[-1])
        new = setting("max_new_tokens", arguments, config)
        if new is None:
            longest = setting("max_length", arguments, config)
            new = 20 if longest is None else max(1, longest - n)
        return n + new - 1

    @staticmethod
    def _check(arguments: dict[str, Any], config: Any) -> None:
        """Raises ConfigError for ways of generating that would go past the release, or that are not supported."""
        refuse_arguments(arguments, config, REFUSED, HARMLESS)
        use_cache = arguments.get("use_cache")
        if use_cache is False or (use_cache is None and getattr(config, "use_cache", None) is False):
            raise ConfigError(
                "use_cache=False is not supported on a protected model: the cache names its release."
            )
