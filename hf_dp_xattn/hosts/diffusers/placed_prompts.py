"""A pipeline whose denoiser reads releases: a public stand-in takes the place of each private prompt before the pipeline sees it.

All that the pipeline and its models do with a prompt (encoders, pooled vectors, masks, lengths) they do with the stand-in. Of its encoded
rows, those that `encode_prompt` gives for it are marked by a placeholder, and the gate of the denoiser has them read from the release.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ...errors import ConfigError, UnsupportedModelError
from ..context import PrivateContext
from ..guard import Guard
from ..host import Named
from ..placeholder import Tag, new_tag
from ..private_run import private_run
from ..shadows import Shadows
from ..text.closed_callbacks import close_callbacks
from ..text.one_step import one_step
from ..text.prompt_swap import PromptSwap, items_of, no_progress
from .denoiser_gate import Call, Calls
from .prompt_encoder import PromptEncoder, changed, is_rows, marks, tensors_of
from .text_arguments import OTHERS, PRIVATE
from .text_side import as_texts

NOT_REACHED = "no encoded prompt reached its denoiser"
TWO = "its denoiser reads two encodings of the prompt side by side"
DEPENDS = "how many rows an encoded prompt has depends on it"
COMPILED = (
    "This pipeline's denoiser is compiled, and its protection is not seen by a compiled graph: leave it uncompiled, or use "
    "mechanism='library'. Nothing was spent."
)


@dataclass(frozen=True)
class PromptOfRelease:
    """What `release.inputs` gives in the place of a prompt: no string, so that no unprotected pipeline takes it for one.

    tag: names the release.
    """

    tag: Tag = field(repr=False)


class ServesPrompts(Protocol):
    """What is asked of the host."""

    guard: Guard
    calls: Calls
    proven: set[str]

    @property
    def models(self) -> dict[str, Any]: ...
    @property
    def encoder(self) -> PromptEncoder: ...
    def name(self, context: Any, groups: Any = None) -> Named: ...
    def forget(self) -> None: ...


class PlacedPrompts(PromptSwap):
    """One pipeline whose calls read releases."""

    def __init__(self, pipe: Any, host: ServesPrompts, guard: Guard, encoder: PromptEncoder) -> None:
        super().__init__(pipe, host, guard)
        self._host, self._encoder, self._at = host, encoder, guard
        self._shadows = Shadows(pipe, {encoder.method: self._encode})

    def install(self, handle: Any) -> None:
        super().install(handle)
        self._shadows.install()

    def remove(self) -> None:
        self._shadows.remove()
        super().remove()

    def lost(self) -> str | None:
        return super().lost() or (
            None if self._shadows.installed() else f"its {self._encoder.method} was replaced"
        )

    # ---- calls -------------------------------------------------------------------------------------------------------------

    def _run(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._at.check_thoroughly()
        self._refuse_compiled()
        bound = inspect.BoundArguments(bound.signature, copy.copy(bound.arguments))
        contexts = self._place(bound.arguments)
        private = [c for c in contexts if isinstance(c, PrivateContext)]
        due = bool(private) and None in self._at.releases.known(private)
        if due or len(self._host.proven) < len(self._host.models):
            self._try(original, bound, len(contexts))
        tags = iter(self._at.bind(self._at.releases.make(private)) if private else ())
        call = Call(tuple(c if isinstance(c, tuple) else next(tags) for c in contexts))
        close_callbacks(bound.arguments, self._more, self._apart_from_call)
        try:
            with self._host.calls.enter(call), self._serving():
                result = original(*bound.args, **bound.kwargs)
        finally:
            self._host.forget()
        call.refuse_nan()
        if not call.read:
            raise self._unsupported(NOT_REACHED)
        return result

    @contextmanager
    def _apart_from_call(self) -> Iterator[None]:
        with super()._apart_from_call(), self._host.calls.enter(None):
            yield

    def _refuse_compiled(self) -> None:
        if any(m._compiled_call_impl is not None for m in self._host.models.values()):
            raise ConfigError(COMPILED)

    def _unsupported(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.host).__name__} cannot be protected: {reason}. Nothing was spent. With mechanism='library' every pipeline with a "
            "`prompt` can."
        )

    def _place(self, arguments: dict[str, Any]) -> list[PrivateContext | Tag]:
        """Puts stand-ins in the place of what is private, which it names, and of releases, whose tags it gives."""
        others = [n for n, v in arguments.items() if PRIVATE.fullmatch(n) and n != "prompt" and v is not None]
        if others:
            raise ConfigError(
                f"`{others[0]}` is not supported beside `prompt` here: give one private text, as `prompt`. Nothing was spent."
            )
        negative = arguments.get("negative_prompt")
        if any(isinstance(n, PromptOfRelease) for n in _items("" if negative is None else negative)):
            raise ConfigError(
                "A release stands in the place of `prompt`; negative prompts are public text. Nothing was spent."
            )
        changes = self._encoder.changed_by(arguments)
        if changes is not None:
            raise ConfigError(
                f"`{changes}` changes how a prompt is encoded, and a release is of the usual encoding: leave it out. Nothing was spent."
            )
        prompt, embeds, stand_in = (
            arguments.get("prompt"),
            arguments.get("prompt_embeds"),
            self._encoder.stand_in,
        )
        if embeds is not None:
            if prompt is not None or not isinstance(embeds, torch.Tensor):
                raise ConfigError(
                    "Pass either `prompt` or `prompt_embeds` (a tensor [B, n, C]). Nothing was spent."
                )
            contexts: list[PrivateContext | Tag] = [*self._host.name(embeds).contexts]
            for name in [n for n in arguments if OTHERS.fullmatch(n)]:  # of the same text
                arguments[name] = None
            self._refuse(arguments)
            arguments["prompt"] = stand_in if len(contexts) == 1 else [stand_in] * len(contexts)
            return contexts
        self._refuse(arguments)
        contexts = [
            item.tag if isinstance(item, PromptOfRelease) else self._host.name(item).contexts[0]
            for item in _prompts(prompt)
        ]
        arguments["prompt"] = stand_in if _is_one(prompt) else [stand_in] * len(contexts)
        return contexts

    def _try(self, original: Callable[..., Any], bound: inspect.BoundArguments, count: int) -> None:
        """The call with public rows in the place of releases, until its denoiser has run on them: what is wrong shows before a charge."""
        call = Call(tuple(new_tag() for _ in range(count)), proving=True)
        self._rehearsed(original, bound, call, ())
        self._host.forget()
        call.refuse_nan()
        if not call.read:
            raise self._unsupported(NOT_REACHED)

    def _rehearsed(
        self,
        original: Callable[..., Any],
        bound: inspect.BoundArguments,
        call: Call,
        models: Sequence[Any],
    ) -> None:
        """The call up to its first step, in silence. models: whose first forward ends it; or a gate does."""
        arguments = inspect.BoundArguments(bound.signature, copy.copy(bound.arguments))
        with (
            one_step(models, bound.arguments.values()),
            no_progress(self.host),
            self._serving(),
            self._host.calls.enter(call),
        ):
            original(*arguments.args, **arguments.kwargs)

    # ---- encode_prompt -----------------------------------------------------------------------------------------------------

    def _encode(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """Its outputs for stand-ins, whose rows are marked: those that depend on the prompt."""
        call, prompt = self._host.calls.current, bound.arguments.get("prompt")
        if call is None or self._at.access.public or prompt is None:
            return original(*bound.args, **bound.kwargs)
        texts = items_of(prompt)
        if list(texts) != [self._encoder.stand_in] * len(call.tags):
            return original(*bound.args, **bound.kwargs)
        with private_run(*self._encoder.modules):  # in silence: nobody asked for the stand-in
            outputs = original(*bound.args, **bound.kwargs)
        tensors = dict(tensors_of(outputs))
        placed = {w: t.clone() for w, t in tensors.items() if self._is_placed(w, t)}
        if not placed:
            return outputs
        for i, tag in enumerate(call.tags):
            now = self._of_another(original, bound, i, {w: tensors[w] for w in placed})
            for where, tensor in placed.items():
                for element in changed(tensors[where], now[where]).nonzero().flatten().tolist():
                    self._mark(call, tag, tensors, where, element, tensor)
        bound.arguments["prompt"] = prompt
        return _replaced(outputs, placed)

    def _of_another(
        self,
        original: Callable[..., Any],
        bound: inspect.BoundArguments,
        element: int,
        known: dict[tuple[int, ...], torch.Tensor],
    ) -> dict[tuple[int, ...], torch.Tensor]:
        """The outputs for another text in the place of one stand-in, of as many rows. known: those for stand-ins alone."""
        alone = isinstance(bound.arguments["prompt"], str)
        texts = items_of(bound.arguments["prompt"])
        for other in self._encoder.others:
            changed_texts = [other if i == element else self._encoder.stand_in for i in range(len(texts))]
            bound.arguments["prompt"] = other if alone else changed_texts
            with private_run(*self._encoder.modules):  # in silence
                now = dict(tensors_of(original(*bound.args, **bound.kwargs)))
            same = all(w in now and now[w].shape == t.shape for w, t in known.items())
            if same and any(not torch.equal(now[w], t) for w, t in known.items()):
                return now
        raise self._unsupported(DEPENDS)

    def _is_placed(self, where: tuple[int, ...], tensor: torch.Tensor) -> bool:
        """Whether what depends on the prompt in this output is not the stand-in's."""
        return is_rows(tensor)

    def _mark(
        self,
        call: Call,
        tag: Tag,
        tensors: dict[tuple[int, ...], torch.Tensor],
        where: tuple[int, ...],
        element: int,
        tensor: torch.Tensor,
    ) -> None:
        """Puts what reads a release in the place of one element of an output. tensors: all outputs, of the stand-in."""
        rows = tensors[where][element]
        same = where == self._encoder.where
        if self._encoder.padded and len(rows) != self._encoder.rows:
            raise ConfigError(
                f"This call encodes a prompt to {len(rows)} rows, and a release has {self._encoder.rows}: leave the length of a prompt "
                "(max_sequence_length) at its default. Nothing was spent."
            )
        if call.rows.get(tag, rows).shape != rows.shape:
            raise self._unsupported(TWO)
        call.rows[tag] = rows
        call.shown[tag] = self._encoder.shown(tensors, element) if same else rows
        tensor[element] = marks(tag, rows)


def _replaced(outputs: Any, placed: dict[tuple[int, ...], torch.Tensor], where: tuple[int, ...] = ()) -> Any:
    if isinstance(outputs, torch.Tensor):
        return placed.get(where, outputs)
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(_replaced(inner, placed, (*where, i)) for i, inner in enumerate(outputs))
    return outputs


def _is_one(prompt: Any) -> bool:
    return isinstance(prompt, (str, PromptOfRelease))


def _items(value: Any) -> list[Any]:
    return [value] if _is_one(value) else list(value)


def _prompts(prompt: Any) -> list[Any]:
    """Strings and releases. Raises ConfigError for anything else."""
    if not isinstance(prompt, (list, tuple)) and not _is_one(prompt):
        as_texts(prompt, "prompt")  # raises
    items = _items(prompt)
    texts = [t for t in items if not isinstance(t, PromptOfRelease)]
    read = iter(as_texts(texts, "prompt") if texts or not items else ())
    return [t if isinstance(t, PromptOfRelease) else next(read) for t in items]


def prompts_of(tags: Sequence[Tag]) -> Any:
    """In the place of prompts, for a call."""
    prompts = [PromptOfRelease(tag) for tag in tags]
    return prompts if len(prompts) > 1 else prompts[0]
