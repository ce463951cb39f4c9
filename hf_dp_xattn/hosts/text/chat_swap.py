"""A `text-generation` pipeline: the private system message of a chat is swapped for released text before the template is filled in.

The rest of a chat (the users' turns, earlier answers, a prefilled one) is public. Template, cache and generation are the pipeline's own.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from ...errors import ConfigError
from ..content_names import Part
from ..guard import handle_on, mark, unmark
from ..shadows import SwappedClass
from ..transformers.decoder_only.chat import BESIDE, private_message, refuse_others
from .generate_gate import GenerateGate
from .one_step import one_step
from .prompt_swap import Names
from .released_texts import ReleasedPrompt, ReleasedText
from .unit_encoders import PROBES

if TYPE_CHECKING:
    from .text_guard import TextGuard

NO_CHAT = (
    'A protected text-generation pipeline takes a chat (or a list of chats), a list of messages whose first one is private: {"role": '
    '"system", "content": "..."}. For a text without one, call it inside `with protected.public():`. Nothing was spent.'
)
Chat = list[dict[str, Any]]


class ChatSwap:
    """One pipeline whose chats' system messages are private, and its model."""

    each, apart = True, True

    def __init__(
        self, pipe: Any, namer: Names, guard: TextGuard, gate: GenerateGate, *, shared: bool
    ) -> None:
        """gate: of its model. shared: the model has one already."""
        self.host, self.model = pipe, pipe.model
        self._namer, self._guard, self._gate, self._shared = namer, guard, gate, shared
        self.saving = gate.saving
        self._swapped = SwappedClass(pipe, self._make_call())

    @classmethod
    def matches(cls, host: Any) -> bool:
        from transformers import TextGenerationPipeline

        return isinstance(host, TextGenerationPipeline)

    @classmethod
    def parts(cls, host: Any) -> Sequence[Any]:
        return ()

    @classmethod
    def around(cls, host: Any, namer: Names, guard: TextGuard, tokenizer: Any) -> Self:
        words = host.tokenizer if tokenizer is None else tokenizer
        shared = getattr(handle_on(host.model), "guard", None) is guard
        return cls(host, namer, guard, GenerateGate(host.model, guard, words), shared=shared)

    def install(self, handle: Any) -> None:
        self._handle = handle
        if not self._shared:
            self._gate.install(handle)
        self._swapped.install()
        mark(self.host, handle)

    def remove(self) -> None:
        self._swapped.remove()
        unmark(self.host, self._handle)
        if not self._shared:
            self._gate.remove()

    def lost(self) -> str | None:
        if self.host.model is not self.model:
            return "the pipeline's model was replaced"
        return self._swapped.lost() or (None if self._shared else self._gate.lost())

    def read_ids(self, context: Any) -> tuple[list[str], list[Part]] | None:
        return self._gate.read_ids(context)

    def ids_of(self, units: Sequence[str], whole: str) -> list[Part]:
        return self._gate.ids_of(units, whole)

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        """With `messages`, the public rest of a chat: what the pipeline takes. Else as its model's `generate` takes it."""
        if "messages" not in public:
            return self._gate.inputs(texts, **public)
        later = list(public.pop("messages"))
        chats = []
        for text, beside in texts:
            whole = str(text) if beside is None else text.joint.join((beside, *text))
            chats.append([{"role": "system", "content": ReleasedPrompt(whole)}, *later])
        return {"text_inputs": chats if len(chats) > 1 else chats[0], **public}

    # ---- calls -------------------------------------------------------------------------------------------------------------

    def _make_call(self) -> Callable[..., Any]:
        original: Any = type(self.host).__call__

        @functools.wraps(original)
        def call(pipe: Any, text_inputs: Any, **kwargs: Any) -> Any:
            guard = self._guard
            public_system = kwargs.pop("public_system", False)
            if guard.access.public:
                return original(pipe, text_inputs, **kwargs)
            guard.check()
            swapped = self._swap(original, text_inputs, kwargs, public_system=bool(public_system))
            with guard.serving():
                result = original(pipe, swapped, **kwargs)
            guard.check()
            return result

        return call

    def _swap(
        self, original: Callable[..., Any], messages: Any, options: dict[str, Any], *, public_system: bool
    ) -> Any:
        """The chats with released text for their system messages.

        Raises:
            ConfigError: no chat, no system message, a further one, tools or documents that are not declared public, or a template that
                leaves the system message out. What the pipeline raises until its first token is chosen. Nothing was spent.
        """
        chats, several = _chats(messages)
        beside = dict(options.get("tokenizer_encode_kwargs") or {})
        beside |= {n: options[n] for n in BESIDE if options.get(n)}
        private = []
        for chat in chats:
            first, content = private_message(chat)
            if not public_system:
                refuse_others(chat[1:], beside)
            self._check_template(chat, beside)
            if not isinstance(first["content"], ReleasedPrompt):
                private.append(content)
        contexts = [context for text in private for context in self._namer.name(text).contexts]
        if contexts and None in self._guard.releases.known(contexts):
            public = [{**chats[0][0], "content": PROBES[0]}, *chats[0][1:]]
            alone = {n: v for n, v in options.items() if n != "streamer"}  # which would print it
            with one_step([self.model], options.values()), self._guard.serving():
                original(self.host, public, **alone)
        released = iter(self._guard.releases.make(contexts) if contexts else ())
        swapped = []
        for chat in chats:
            content = chat[0]["content"]
            text = (
                content if isinstance(content, ReleasedPrompt) else ReleasedPrompt(str(next(released).text))
            )
            swapped.append([{**chat[0], "content": text}, *chat[1:]])
        return swapped if several else swapped[0]

    def _check_template(self, chat: Chat, beside: Mapping[str, Any]) -> None:
        """Raises ConfigError where the template fails on public stand-ins, or leaves the system message out."""
        mark = f"dpx{secrets.token_hex(8)}"
        words = self.host.tokenizer
        more = {
            n: v
            for n, v in beside.items()
            if n not in ("tokenize", "return_tensors", "return_dict", "padding")
        }
        try:
            filled = words.apply_chat_template(
                [{**chat[0], "content": mark}, *chat[1:]], tokenize=False, **more
            )
        except Exception as error:  # of the template
            raise ConfigError(
                f"The chat template fails on these messages ({type(error).__name__}): there may be none, or one that takes no system "
                "message, or roles in another order. Nothing was spent."
            ) from None
        if mark not in filled:
            raise ConfigError("This chat template leaves the system message out. Nothing was spent.")


def _chats(inputs: Any) -> tuple[list[Chat], bool]:
    """The chats of a call, and whether they are several. Raises ConfigError for anything else."""
    messages: Any = getattr(inputs, "messages", inputs)  # transformers' own Chat
    if isinstance(messages, (list, tuple)) and messages:
        if all(isinstance(m, Mapping) for m in messages):
            return [list(messages)], False
        chats: list[Any] = [getattr(c, "messages", c) for c in messages]
        if all(isinstance(c, (list, tuple)) and c and all(isinstance(m, Mapping) for m in c) for c in chats):
            return [list(c) for c in chats], True
    raise ConfigError(NO_CHAT)
