"""Methods of a Stable Diffusion pipeline that see the prompt, check the call, save it or hand on the picture, shadowed; and its call."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from ...errors import ConfigError, ProtectionLostError
from ...privacy.units import public_counts
from ..accounts import PROTECT_AGAIN
from ..bindings import unique
from ..context import PrivateContext
from ..nan import refuse_nan
from ..placeholder import Tag, read_tags
from ..saving import SaveShadow
from ..shadows import Shadows, SwappedClass
from .architectures import unwrap
from .forward_inputs import NO_SCALE
from .lora_scale import call_scale
from .prompt_contexts import name_contexts
from .public_arguments import check_arguments
from .text_side import TextSide, as_texts
from .unet_forward import ForwardGate, ServesUNet

NO_CLIP_SKIP = (
    "clip_skip is not supported on a protected pipeline (diffusers itself fails on it with current transformers). Encode the prompt as you "
    "need it inside `with protected.encoding():`, and pass it as prompt_embeds, which are private too."
)
LOOKS = "_dp_xattn_looks_for_nan"  # marks what hands on pictures


class ServesPipelines(ServesUNet, Protocol):
    """What the patch of a pipeline asks of its UNet's host."""

    gate: ForwardGate

    @property
    def channels(self) -> int: ...
    @property
    def hidden_length(self) -> int: ...
    @property
    def by_phrases(self) -> bool: ...


class PipelinePatch:
    """Shadows the methods of one pipeline that see the prompt, what diffusers itself would check after the first step only, and what hands
    on the picture; its calls wait for each other."""

    def __init__(self, pipe: Any, host: ServesPipelines, text: TextSide) -> None:
        self.pipe = pipe
        self.text = text
        self._host, self._guard, self._gate_of_unet = host, host.guard, host.gate
        serve = {
            "encode_prompt": self._encode_prompt,
            "check_inputs": self._check_inputs,
            "prepare_extra_step_kwargs": self._check_extra,
        }
        self._shadows = Shadows(pipe, serve, defaults=True)
        self._saving = SaveShadow(pipe, host.guard)
        self._outer: Any = None  # the hook on a compiled UNet
        self._swapped = SwappedClass(pipe, self._make_call())
        self._postprocess: tuple[Any, Callable[..., Any]] | None = None

    def install(self) -> None:
        self._shadows.install()
        self._shadow_postprocess()
        self._saving.install()
        self._swapped.install()

    def remove(self) -> None:
        self._swapped.remove()
        self._shadows.remove()
        if self._postprocess is not None:
            processor, shadow = self._postprocess
            if vars(processor).get("postprocess") is shadow:
                del vars(processor)["postprocess"]
        self._saving.remove()
        if self._outer is not None:
            self._outer.remove()

    def _make_call(self) -> Callable[..., Any]:
        """Calls that wait for each other: a pipeline keeps its scheduler's and its own state of a call on itself."""
        original: Any = type(self.pipe).__call__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            with self._guard.calling, self._gate_of_unet.inside_pipeline():
                if self._guard.access.public:
                    return original(pipe, *args, **kwargs)
                bound = signature.bind(pipe, *args, **kwargs)
                check_arguments(pipe, bound.arguments)
                with call_scale(bound.arguments, (unwrap(pipe.unet), pipe.text_encoder)):
                    result = original(*bound.args, **bound.kwargs)
                self._check_parts()
                self._guard.check()  # what was unprotected on the way has read a placeholder
                return result

        return call

    def _shadow_postprocess(self) -> None:
        processor = self.pipe.image_processor
        original = processor.postprocess

        @functools.wraps(original)
        def postprocess(image: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._guard.access.public:
                refuse_nan(image)  # once, behind all steps: NaN in one of them stays in all that follow
            return original(image, *args, **kwargs)

        setattr(postprocess, LOOKS, True)
        self._postprocess = processor, postprocess
        vars(processor)["postprocess"] = postprocess

    def check(self) -> None:
        """Raises ProtectionLostError unless the pipeline still consists of what was protected."""
        self._guard.check_thoroughly()
        self._check_parts()

    def _check_parts(self) -> None:
        lost = None
        if unwrap(self.pipe.unet) is not self._host.model:
            lost = "its UNet"
        elif self.pipe.text_encoder is not self.text.encoder and unwrap(self.pipe.text_encoder) is not unwrap(
            self.text.encoder
        ):
            lost = "its text encoder"
        elif self.pipe.tokenizer is not self.text.tokenizer:
            lost = "its tokenizer"
        elif not self._shadows.installed():
            lost = "its encode_prompt"
        elif not self._looks_at_pictures():
            lost = "its image_processor"
        if lost is not None:
            raise ProtectionLostError(
                f"{type(self.pipe).__name__} was protected and then {lost} was replaced. Nothing was run. Call dpx.unprotect(pipe) and "
                f"{PROTECT_AGAIN}."
            )

    def _looks_at_pictures(self) -> bool:
        """Whether NaN is still looked for in what is handed on. A pipeline that shares the processor may have wrapped it once more."""
        processor = self.pipe.image_processor
        shadowed = self._postprocess is not None and self._postprocess[0] is processor
        return shadowed and hasattr(vars(processor).get("postprocess"), LOOKS)

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
            batch, rows, channels = embeds.shape
            config = self._guard.config
            if public_counts(config.unit, config.neighboring, rows, 0)["rows"] is None and None in read_tags(
                embeds
            ):
                rows = self._host.hidden_length  # as the placeholder's will be
            arguments["prompt_embeds"] = torch.empty(batch, rows, channels, device="meta")
        return original(*bound.args, **bound.kwargs)

    def _encode_prompt(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Releases what is private, then lets diffusers encode the negative prompt and repeat the placeholder. Holds the lock throughout:
        a tokenizer serves one thread at a time."""
        with self._guard.lock:
            return self._encode(original, bound)

    def _encode(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self.check()
        if self._guard.access.public:
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
        self._check_scales()
        tags, rows = self._private_tags(a["prompt"], a["prompt_embeds"])
        if a["do_classifier_free_guidance"]:
            self._check_negative(a["negative_prompt_embeds"], len(tags), rows)
        self._make_ready(tags, negative_tags, device)
        a["prompt"] = None
        a["prompt_embeds"] = self._guard.placeholder(tags, rows, device)
        with self._guard.access.enter("encoding"):
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
        rows = contexts[0].public_length(self._guard.config, self._host.hidden_length)
        return self._guard.promises.make(contexts), rows

    def _make_ready(
        self, tags: Sequence[Tag], negative_tags: Sequence[Tag | None], device: torch.device
    ) -> None:
        """Releases that exist are verified and at hand; one that is due is made by the UNet's gate. A gate that is traced makes none: there
        the outer module's does, or, where the UNet was compiled in place, it is made now."""
        outer, unet = self.pipe.unet, self._host.model
        if outer is not unet and (self._outer is None or self._outer.id not in outer._forward_pre_hooks):
            self._outer = outer.register_forward_pre_hook(self._gate, with_kwargs=True)
        active = unique([*tags, *negative_tags])
        if outer is unet and unet._compiled_call_impl is not None:
            self._guard.promises.keep(active)
        if not self._guard.promises.due(active):
            self._host.activate(active, device)

    @torch.compiler.disable
    def _gate(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a module around the UNet (`torch.compile`), which runs before anything is traced."""
        if self._guard.active:
            self._gate_of_unet.read(args, kwargs)

    def _check_scales(self) -> None:
        for name in ("guidance_scale", "guidance_rescale"):
            _check_number(name, getattr(self.pipe, f"_{name}", 0.0))

    @staticmethod
    def _check_extra(original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """What goes to the scheduler's step."""
        generator = bound.arguments["generator"]
        each = generator if isinstance(generator, (list, tuple)) else [generator]
        if not all(g is None or isinstance(g, torch.Generator) for g in each):
            raise ConfigError("`generator` must be a torch.Generator, or a list of them.")
        _check_number("eta", bound.arguments["eta"])
        return original(*bound.args, **bound.kwargs)

    def _check_negative(self, embeds: Any, batch: int, rows: int) -> None:
        """Whether the negative prompt, which diffusers joins to the placeholder, has its shape. Raises ConfigError."""
        if embeds is not None:
            want = [batch, rows, self._host.channels]
            if not isinstance(embeds, torch.Tensor) or list(embeds.shape) != want:
                shape = list(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
                raise ConfigError(
                    f"`negative_prompt_embeds` must be {want}, as the prompt's, got {shape}. Nothing was spent."
                )
        elif not self.text.available:
            raise ConfigError(
                "This pipeline has no text encoder for the negative prompt: pass negative_prompt_embeds, or guidance_scale=1."
            )
        elif (
            self.text.limit is not None and rows > self.text.limit
        ):  # diffusers encodes the text at the prompt's length
            raise ConfigError(
                f"The private context's placeholder has {rows} rows, and the text encoder of the negative prompt takes {self.text.limit} "
                f"tokens: pass negative_prompt_embeds {[batch, rows, self._host.channels]} (also for the empty one, which is the "
                "default), or guidance_scale=1. Nothing was spent."
            )

    def _name(self, context: Any) -> list[PrivateContext]:
        return name_contexts(context, self.text, self._host.channels, phrases=self._host.by_phrases)

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


def _check_number(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is one finite number; diffusers finds out after the first step."""
    try:
        numeric = not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        numeric = False
    if not numeric:
        raise ConfigError(f"`{name}` must be one finite number, got {type(value).__name__}.")
