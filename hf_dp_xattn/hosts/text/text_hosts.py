"""Which hosts are served by released text, and by what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedModelError
from ..diffusers.architectures import unwrap
from ..guard import handle_on
from .chat_swap import ChatSwap
from .generate_gate import GenerateGate
from .prompt_swap import PromptSwap, text_encoders

if TYPE_CHECKING:
    from .protected_text import ProtectedText, Surface

SUPPORTED = (
    "With mechanism='library' a host is a diffusers pipeline with a `prompt`, a text-generation pipeline of transformers, a model of "
    "transformers that generates text from text, or None (the released text is for a host that is elsewhere)."
)


def surface_of(host: Any, handle: ProtectedText, tokenizer: Any = None) -> Surface:
    """What serves a host. Raises UnsupportedModelError for any other kind."""
    from diffusers import DiffusionPipeline
    from transformers import Pipeline, PreTrainedModel, TextGenerationPipeline

    if isinstance(host, DiffusionPipeline):
        return PromptSwap(host, handle)
    if isinstance(host, TextGenerationPipeline):
        known = handle_on(host.model) is handle
        words = host.tokenizer if tokenizer is None else tokenizer
        return ChatSwap(host, handle, GenerateGate(host.model, handle, words), shared=known)
    if isinstance(unwrap(host), PreTrainedModel) and not isinstance(host, Pipeline):
        return GenerateGate(unwrap(host), handle, tokenizer)
    raise UnsupportedModelError(
        f"{type(unwrap(host)).__name__} cannot be protected. {SUPPORTED} Nothing was patched."
    )


def handle_of_parts(host: Any) -> Any:
    """The handle of a part that a host shares with one that is protected by released text; None where there is none."""
    from diffusers import DiffusionPipeline

    parts = [host, *(text_encoders(host) if isinstance(host, DiffusionPipeline) else ())]
    found = [handle_on(p) for p in map(unwrap, parts)]
    return next((handle for handle in found if handle is not None), None)
