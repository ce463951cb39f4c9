"""The two methods of a Stable Diffusion pipeline that see the prompt, and the one that saves it, shadowed by instance attributes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, ProtectionLostError
from .architectures import unwrap
from .context import PrivateContext, name_contexts
from .placeholder import Tag, read_tags
from .saving import SaveShadow
from .text import TextSide, as_texts

if TYPE_CHECKING:
    from .handle import ProtectedPipeline

NO_CLIP_SKIP = (
    "clip_skip is not supported on a protected pipeline (diffusers itself fails on it with current transformers). Encode the prompt as you "
    "need it and pass it as prompt_embeds, which are private too."
)


class PipelinePatch:
    """Shadows `encode_prompt` and `check_inputs` of one pipeline."""

    def __init__(self, pipe: Any, handle: ProtectedPipeline, text: TextSide) -> None:
        self.pipe = pipe
        self.text = text
        self._handle = handle
        self._shadows: dict[str, Callable[..., Any]] = {}
        self._saving = SaveShadow(pipe, handle)

    def install(self) -> None:
        for name, shadow in (("encode_prompt", self._encode_prompt), ("check_inputs", self._check_inputs)):
            original = getattr(self.pipe, name)
            signature = inspect.signature(original)

            def wrapped(
                *args: Any,
                _shadow: Any = shadow,
                _original: Any = original,
                _signature: Any = signature,
                **kwargs: Any,
            ) -> Any:
                bound = _signature.bind(*args, **kwargs)
                bound.apply_defaults()
                return _shadow(_original, bound)

            self._shadows[name] = vars(self.pipe)[name] = functools.wraps(original)(wrapped)
        self._saving.install()

    def remove(self) -> None:
        for name, shadow in self._shadows.items():
            if vars(self.pipe).get(name) is shadow:
                del vars(self.pipe)[name]
        self._saving.remove()

    def check(self) -> None:
        """Raises ProtectionLostError unless the pipeline still consists of what was protected."""
        self._handle.check_thoroughly()
        lost = None
        if unwrap(self.pipe.unet) is not self._handle.unet:
            lost = "its UNet"
        elif self.pipe.text_encoder is not self.text.encoder and unwrap(self.pipe.text_encoder) is not unwrap(
            self.text.encoder
        ):
            lost = "its text encoder"
        elif self.pipe.tokenizer is not self.text.tokenizer:
            lost = "its tokenizer"
        elif any(vars(self.pipe).get(name) is not shadow for name, shadow in self._shadows.items()):
            lost = "its encode_prompt"
        if lost is not None:
            raise ProtectionLostError(
                f"{type(self.pipe).__name__} was protected and then {lost} was replaced. Nothing was run. Call dpx.unprotect(pipe) and "
                "protect again."
            )

    def _check_inputs(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """diffusers' own check, without the prompt: its messages quote it."""
        arguments = bound.arguments
        prompt, embeds = arguments["prompt"], arguments["prompt_embeds"]
        if prompt is not None:
            if not isinstance(prompt, (str, list)):  # as diffusers, which would quote it
                raise ConfigError(
                    f"`prompt` must be a string or a list of strings, got {type(prompt).__name__}."
                )
            texts = as_texts(prompt, "prompt")
            if embeds is not None:
                raise ConfigError("Pass either `prompt` or `prompt_embeds`, not both.")
            arguments["prompt"] = "private" if isinstance(prompt, str) else ["private"] * len(texts)
        elif embeds is not None and (not isinstance(embeds, torch.Tensor) or embeds.ndim != 3):
            raise ConfigError("`prompt_embeds` must be a tensor [B, n, C].")
        elif embeds is not None:
            arguments["prompt_embeds"] = torch.empty(embeds.shape, device="meta")
        return original(*bound.args, **bound.kwargs)

    def _encode_prompt(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Releases what is private, then lets diffusers encode the negative prompt and repeat the placeholder."""
        from .handle import NO_SCALE

        self.check()
        if self._handle.access.public:
            return original(*bound.args, **bound.kwargs)
        a = bound.arguments
        if a["clip_skip"] is not None:
            raise ConfigError(NO_CLIP_SKIP)
        if a["lora_scale"] not in (None, 1, 1.0):
            raise ConfigError(NO_SCALE)
        device = a["device"] or self.pipe._execution_device
        negative_tags: list[Tag | None] = []
        if a["do_classifier_free_guidance"]:
            a["negative_prompt"] = self._negative(
                a["negative_prompt"], self._batch(a["prompt"], a["prompt_embeds"])
            )
            if a["negative_prompt_embeds"] is not None:
                negative_tags = read_tags(a["negative_prompt_embeds"])
        tags, rows = self._private_tags(a["prompt"], a["prompt_embeds"])
        active = dict.fromkeys([*tags, *(t for t in negative_tags if t is not None)])
        self._handle.activate(tuple(active), device)
        a["prompt"] = None
        a["prompt_embeds"] = self._handle.placeholder(tags, rows, device)
        with self._handle.access.enter("encoding"):
            return original(*bound.args, **bound.kwargs)

    def _private_tags(self, prompt: Any, embeds: Any) -> tuple[tuple[Tag, ...], int]:
        """One tag per prompt, and the number of rows of their placeholders."""
        if prompt is not None:
            contexts = self._name(list(as_texts(prompt, "prompt")))
        elif not isinstance(embeds, torch.Tensor) or embeds.ndim != 3:
            raise ConfigError("`prompt_embeds` must be a tensor [B, n, C].")
        else:
            tags = read_tags(embeds)
            known = tuple(t for t in tags if t is not None)
            if known and len(known) == len(tags):
                return known, embeds.shape[1]
            if known:
                raise ConfigError(
                    "`prompt_embeds` mixes placeholders with embeddings; release the embeddings first."
                )
            contexts = self._name(embeds)
        released = self._handle.release_contexts(contexts)
        return self._handle.bind_contexts(released), contexts[0].rows

    def _name(self, context: Any) -> list[PrivateContext]:
        return name_contexts(context, self.text, self._handle.channels, phrases=self._handle.by_phrases)

    @staticmethod
    def _batch(prompt: Any, embeds: Any) -> int:
        return len(as_texts(prompt, "prompt")) if prompt is not None else len(embeds)

    @staticmethod
    def _negative(negative: Any, batch: int) -> list[str] | None:
        """diffusers compares the negative prompt with the prompt, which it does not get here: one text serves the whole batch."""
        if negative is None:
            return None
        texts = list(as_texts(negative, "negative_prompt"))
        if len(texts) not in (1, batch):
            raise ConfigError(
                f"Got {len(texts)} negative prompts for {batch} prompts; pass one, or one for each."
            )
        return texts * batch if len(texts) == 1 else texts
