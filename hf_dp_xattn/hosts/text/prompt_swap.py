"""Any diffusers pipeline with a `prompt`: a private one is swapped for released text before the pipeline sees it.

All that the pipeline does with a prompt (encoders, pooled vectors, masks, lengths, prompt enhancement) it does with public text, so nothing
in it is patched and nothing has to be known of it. Its text encoders and denoisers are closed outside of such calls, and within them to
all code but the pipeline's own: `encode_prompt` by hand, another pipeline that shares them, or a callback would read a text that was not
released.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, Self

from torch import nn

from ...errors import ConfigError, UnsupportedModelError
from ..access import Access
from ..call_stack import HostCode
from ..content_names import Part
from ..diffusers.architectures import unwrap
from ..diffusers.prompt_readings import read_parts
from ..diffusers.public_arguments import check_callbacks
from ..diffusers.text_arguments import PRIVATE, check_texts
from ..diffusers.text_side import as_texts
from ..guard import mark, unmark
from ..host import Named
from ..model_gates import CallGate, TextGate, parts_of
from ..saving import Saved, SaveShadow
from ..shadows import SwappedClass
from .closed_callbacks import close_callbacks
from .one_step import one_step
from .released_texts import ReleasedPrompt, ReleasedText
from .unit_encoders import PROBES

CLOSED = (
    "The text encoder belongs to a protected pipeline and may not run on its own: it would read a text that was not released. Protect "
    "every pipeline that shares it (dpx.protect(other_pipe, config, calibration=library)), and pass it the text itself. Only if this text "
    "is public, use `with protected.public():`."
)


def takes_prompt(cls: type) -> bool:
    """Whether calls of a pipeline class have an argument `prompt`."""
    return "prompt" in inspect.signature(cls.__call__).parameters


class Names(Protocol):
    """Gives a private text the names that it is charged under."""

    def name(self, context: Any) -> Named: ...


class Serves(Saved, Protocol):
    """What is asked of the guard of a pipeline."""

    access: Access
    calling: Any
    lock: Any

    @property
    def releases(self) -> Any: ...
    def check(self) -> None: ...
    def serving(self, code: HostCode | None = None) -> AbstractContextManager[None]: ...


class PromptSwap:
    """One pipeline whose calls read released text."""

    each, apart = False, False

    def __init__(self, pipe: Any, namer: Names, guard: Serves) -> None:
        if not takes_prompt(type(pipe)):
            raise UnsupportedModelError(
                f"{type(pipe).__name__} takes no `prompt`, so there is no private text that could be released in its stead. Nothing was "
                "patched."
            )
        self.host = self.model = pipe
        self._namer, self._guard = namer, guard
        self._swapped = SwappedClass(pipe, self._make_call())
        self._gates: dict[nn.Module, TextGate] = {}
        self._drawing: dict[nn.Module, CallGate] = {}
        self.saving = SaveShadow(pipe, guard)
        known = inspect.signature(type(pipe).__call__).parameters.values()
        self._more = next((p.name for p in known if p.kind is p.VAR_KEYWORD), None)
        self._defaults = {p.name: p.default for p in known if p.default is not p.empty}

    @classmethod
    def matches(cls, host: Any) -> bool:
        from diffusers import DiffusionPipeline

        return isinstance(host, DiffusionPipeline)

    @classmethod
    def parts(cls, host: Any) -> Sequence[Any]:
        return text_encoders(host)

    @classmethod
    def around(cls, host: Any, namer: Names, guard: Serves, tokenizer: Any) -> Self:
        return cls(host, namer, guard)

    def install(self, handle: Any) -> None:
        self._handle = handle
        mark(self.host, handle)
        self._close()
        self.saving.install()
        self._swapped.install()

    def remove(self) -> None:
        self._swapped.remove()
        self.saving.remove()
        for part, gate in self._gates.items():
            gate.remove()
            unmark(part, self._handle)
        for drawing in self._drawing.values():
            drawing.remove()
        unmark(self.host, self._handle)
        self._gates.clear()
        self._drawing.clear()

    def draws_with(self, model: Any) -> bool:
        """Whether this is one of its denoisers, or what is compiled of one."""
        return any(unwrap(drawing) is unwrap(model) for drawing in self._drawing)

    def lost(self) -> str | None:
        if not TextGate.installed(self._gates.values()):
            return "the gate of a text encoder was removed"
        if not TextGate.installed(self._drawing.values()):
            return "the gate of a model that draws was removed"
        return self._swapped.lost()

    def read_ids(self, context: Any) -> tuple[list[str], list[Part]] | None:
        return None

    def ids_of(self, units: Sequence[str], whole: str) -> list[Part]:
        return read_parts(self.host, units, whole, apart=True)  # no prompt is given as token ids

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        if public:
            raise ConfigError(
                f"A diffusers host takes a public `prompt` only, got {', '.join(sorted(public))}."
            )
        joined = [str(t) if beside is None else t.joint.join((beside, *t)) for t, beside in texts]
        prompts = [ReleasedPrompt(text) for text in joined]
        return {"prompt": prompts if len(prompts) > 1 else prompts[0]}

    def _serving(self) -> AbstractContextManager[None]:
        """Opens the gates to the pipeline's own code. A scheduler is its caller's choice, and may be its caller's code."""
        parts = [c for n, c in self.host.components.items() if "scheduler" not in n]
        return self._guard.serving(HostCode([self.host, *parts]))

    # ---- text encoders -----------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        """A gate on each text encoder that the pipeline has by now, and on its parts, which some libraries call one by one."""
        for encoder in text_encoders(self.host):
            for part in parts_of(encoder):
                if part not in self._gates:
                    self._gates[part] = TextGate(part, self._guard.access, CLOSED)
                    mark(part, self._handle)  # for other pipelines that share it
        for component in _components(self.host):
            if not _draws(unwrap(component)):
                continue
            for model in {component, unwrap(component)}:  # a compiled one, and the model in it
                if model not in self._drawing:
                    self._drawing[model] = CallGate(model, self._guard.access)
                self._drawing[model].surround()

    # ---- calls -------------------------------------------------------------------------------------------------------------

    def _make_call(self) -> Callable[..., Any]:
        original: Any = type(self.host).__call__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def call(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            guard = self._guard
            with guard.calling:
                if guard.access.public:
                    return original(pipe, *args, **kwargs)
                guard.check()
                self._close()
                result = self._run(original, signature.bind(pipe, *args, **kwargs))
                guard.check()
                return result

        return call

    def _run(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """A call that is not declared public."""
        self._swap(original, bound)
        with self._serving():
            return original(*bound.args, **bound.kwargs)

    def _swap(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> None:
        """Released text in the place of each private one, charged before it is encoded; and callbacks that run behind closed gates.

        Raises:
            ConfigError: private text in another form. What the pipeline raises until its first denoising step is done. Nothing was spent.
        """
        arguments, guard = bound.arguments, self._guard
        self._refuse(arguments)
        texts = {
            name: as_texts(value, name)
            for name, value in arguments.items()
            if PRIVATE.fullmatch(name) and value is not None
        }
        private = [
            t for name in texts for t in items_of(arguments[name]) if not isinstance(t, ReleasedPrompt)
        ]
        contexts = [context for text in private for context in self._namer.name(text).contexts]
        if contexts and None in guard.releases.known(contexts):
            self._rehearse(original, bound, tuple(texts))
        with guard.lock:
            released = iter(guard.releases.make(contexts) if contexts else ())
        for name in texts:
            argument = arguments[name]
            # plain strings: some pipelines compare types
            prompts = [
                str(t if isinstance(t, ReleasedPrompt) else next(released).text) for t in items_of(argument)
            ]
            arguments[name] = prompts[0] if isinstance(argument, str) else prompts
        close_callbacks(arguments, self._more, self._apart_from_call)

    @contextmanager
    def _apart_from_call(self) -> Iterator[None]:
        """For code of a user that runs within a call: it may do no more than outside of one."""
        with self._guard.access.leave():
            yield

    def _refuse(self, arguments: dict[str, Any]) -> None:
        check_callbacks({**arguments, **arguments.get(self._more or "", {})})
        check_texts(arguments, self._defaults, self._more)

    def _rehearse(
        self, original: Callable[..., Any], bound: inspect.BoundArguments, names: Sequence[str]
    ) -> None:
        """The call with a public text, through the first forward of a model that draws: what is wrong shows before a charge."""
        models = [unwrap(m) for m in _components(self.host) if _draws(unwrap(m))]
        if not models or any(m._compiled_call_impl is not None for m in models):
            return
        stand_in = inspect.BoundArguments(bound.signature, copy.copy(bound.arguments))
        for name in names:
            value = stand_in.arguments[name]
            stand_in.arguments[name] = (
                PROBES[0] if isinstance(value, str) else [PROBES[0]] * len(items_of(value))
            )
        with one_step(models, stand_in.arguments.values()), no_progress(self.host), self._serving():
            original(*stand_in.args, **stand_in.kwargs)


def items_of(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else list(value)


def _components(pipe: Any) -> list[nn.Module]:
    modules = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    return list({id(unwrap(c)): c for c in modules}.values())


def _draws(module: Any) -> bool:
    from diffusers import ModelMixin

    return isinstance(module, ModelMixin) and not hasattr(module, "decode")


def text_encoders(pipe: Any) -> list[Any]:
    """The models of a pipeline that read tokens."""
    from transformers import PreTrainedModel

    def reads(module: Any) -> bool:
        return (
            isinstance(module, PreTrainedModel)
            and "input_ids" in inspect.signature(module.forward).parameters
        )

    named = [
        unwrap(c) for n, c in pipe.components.items() if "text_encoder" in n and isinstance(c, nn.Module)
    ]
    return list(dict.fromkeys([*named, *(m for c in _components(pipe) if reads(m := unwrap(c)))]))


@contextmanager
def no_progress(pipe: Any) -> Iterator[None]:
    before = vars(pipe).get("_progress_bar_config")
    pipe._progress_bar_config = {"disable": True}
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
