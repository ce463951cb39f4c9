"""A language model that is served by released text: `generate` runs on ids that begin with a release's own, and on nothing else.

What follows the released text is the user's own and public, as are the head before it and what an encoder-decoder model's decoder starts
with. The model reads all of it as any text: every cache, attention implementation and way of generating works as without a protection.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import torch

from ...errors import ConfigError, ContextError, ProtectionLostError, UnsupportedModelError
from ..bindings import MAX_BINDINGS
from ..content_names import Part, id_parts, special_ids, units_of_text
from ..diffusers.architectures import unwrap
from ..diffusers.text_side import without_length_warning
from ..guard import mark, unmark
from ..model_gates import TextGate
from ..saving import SaveShadow
from ..shadows import Shadows
from ..transformers.generating import named_arguments
from .prompt_swap import Names
from .released_texts import ReleasedText
from .unit_encoders import tokenizer_beside

if TYPE_CHECKING:
    from .text_guard import TextGuard

CLOSED = (
    "This model is protected and runs on released text only: release the private text first, protected.release(text), and call "
    "model.generate(**release.inputs(...)), or its text-generation pipeline. Only if all of the text is public, use "
    "`with protected.public():`."
)
OTHER_IDS = (
    "generate was given ids that do not begin with a released text: pass those of release.inputs(input_ids=...), where input_ids are the "
    "user's own. Only if all of it is public, use `with protected.public():`. Nothing was run."
)


class GenerateGate:
    """One language model. tokenizer: by default the one that lies beside it."""

    each, apart = True, True

    def __init__(self, model: Any, guard: TextGuard, tokenizer: Any) -> None:
        if not model.can_generate() or model.main_input_name != "input_ids":
            raise UnsupportedModelError(
                f"{type(model).__name__} does not generate text from text. Supported are models of transformers with a language head "
                "(...ForCausalLM, ...ForConditionalGeneration) whose input is text. Nothing was patched."
            )
        self.host = self.model = model
        self._guard, self._tokenizer = guard, tokenizer
        self._seq2seq = bool(model.config.is_encoder_decoder)
        self._known: OrderedDict[tuple[int, ...], None] = OrderedDict()  # what rows of ids may begin with
        self._gates: list[TextGate] = []
        self._shadows = Shadows(model, {"generate": self._generate, "generate_batch": self._refuse})
        self.saving = SaveShadow(model, guard)

    @classmethod
    def matches(cls, host: Any) -> bool:
        from transformers import Pipeline, PreTrainedModel

        return isinstance(unwrap(host), PreTrainedModel) and not isinstance(host, Pipeline)

    @classmethod
    def parts(cls, host: Any) -> Sequence[Any]:
        return ()

    @classmethod
    def around(cls, host: Any, namer: Names, guard: TextGuard, tokenizer: Any) -> Self:
        return cls(unwrap(host), guard, tokenizer)

    def install(self, handle: Any) -> None:
        self._handle = handle
        inner = [self.model.base_model, *([self.model.get_encoder()] if self._seq2seq else [])]
        for module in dict.fromkeys([self.model, *inner]):
            self._gates.append(TextGate(module, self._guard.access, CLOSED))
        self._shadows.install()
        self.saving.install()
        mark(self.model, handle)

    def remove(self) -> None:
        for gate in self._gates:
            gate.remove()
        self._shadows.remove()
        self.saving.remove()
        unmark(self.model, self._handle)
        self._known.clear()

    def lost(self) -> str | None:
        if not TextGate.installed(self._gates):
            return "a gate of the model was removed"
        if not self._shadows.installed():
            return "the model's `generate` was replaced"
        return None

    # ---- generate ----------------------------------------------------------------------------------------------------------

    def _refuse(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        raise ConfigError(
            "Continuous batching (generate_batch) runs in threads of its own, where no `public()` holds. Call model.generate, also with "
            "public text."
        )

    def _generate(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        access = self._guard.access
        if access.public or access.encoding:  # the pipeline's own call
            return original(*bound.args, **bound.kwargs)
        self._guard.check()
        arguments = named_arguments(bound)
        ids = arguments.get("input_ids", arguments.get("inputs"))
        if not self._may_run(ids, arguments):
            raise ProtectionLostError(OTHER_IDS)
        with self._guard.serving():
            result = original(*bound.args, **bound.kwargs)
        self._guard.check()
        return result

    def _may_run(self, ids: Any, arguments: dict[str, Any]) -> bool:
        """Whether each row of ids [B, n], without its padding, begins with (of an encoder-decoder model: is) a released text's."""
        if any(arguments.get(n) is not None for n in ("inputs_embeds", "encoder_outputs")):
            return False
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
            return False
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
            return False
        seen = torch.ones_like(ids).bool() if mask is None else mask.to(ids.device).bool()
        if not bool((ids[~seen] == self._pad()).all()):  # some models read what a mask hides
            return False
        rows = [tuple(row[real].tolist()) for row, real in zip(ids, seen, strict=True)]
        with self._guard.lock:
            if self._seq2seq:
                return all(row in self._known for row in rows)
            lengths = {len(known) for known in self._known}
            return all(any(row[:n] in self._known for n in lengths) for row in rows)

    # ---- releases ----------------------------------------------------------------------------------------------------------

    def _words(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = tokenizer_beside(self.model)
        return self._tokenizer

    def read_ids(self, context: Any) -> tuple[list[str], list[Part]] | None:
        """Units given as token ids: a list of lists (or of tensors [n]), or a tensor [n] or [1, n], which is one unit."""
        if isinstance(context, torch.Tensor):
            context = list(context) if context.ndim == 2 and len(context) == 1 else [context]
        if not isinstance(context, (list, tuple)) or not context or all(isinstance(c, str) for c in context):
            return None
        texts, names = [], []
        for unit in context:
            try:
                ids = torch.as_tensor(unit)
            except (TypeError, ValueError, RuntimeError):
                ids = torch.zeros(0, 0)
            if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ContextError(
                    "Units are strings, or token ids: a list of integers for each unit, none of them empty. Nothing was spent."
                )
            texts.append(str(self._words().decode(ids.tolist(), skip_special_tokens=True)))
            names.append(ids.to("cpu", torch.int64))
        return texts, self._named(names)

    def ids_of(self, units: Sequence[str], whole: str) -> list[Part]:
        """Of the units' ids one behind the other, and of the whole text's where that is not the same."""
        encodings: list[torch.Tensor] = []
        with (
            suppress(Exception),
            without_length_warning(self._words()),
        ):  # without a tokenizer no ids are taken in
            for text in (*units, whole):
                ids = self._words()(text=text, add_special_tokens=False).input_ids
                encodings.append(torch.tensor(ids, dtype=torch.int64))
        if len(encodings) <= len(units) or not all(map(len, encodings)):
            return []
        *apart, joined = encodings
        named = self._named(apart)
        if not torch.equal(joined, torch.cat(apart)):
            named += id_parts(joined, special_ids(self.model), None, units_of_text(units))
        return named

    def _named(self, ids: Sequence[torch.Tensor]) -> list[Part]:
        """ids: of each unit."""
        owners = [i for i, unit_ids in enumerate(ids) for _ in unit_ids]
        return list(id_parts(torch.cat(list(ids)), special_ids(self.model), owners))

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        user_ids, mask = public.pop("input_ids", None), public.pop("attention_mask", None)
        head = public.pop("public_head", None)
        joined = [str(t) if beside is None else t.joint.join((beside, *t)) for t, beside in texts]
        if self._seq2seq:
            if user_ids is not None or head is not None:
                raise ConfigError(
                    "Public text beside a released document is passed as text: release.inputs(prompt=...)."
                )
            rows = [self._ids(text, special=True) for text in joined]
            begins = rows
        else:
            first = self._start() if head is None else torch.as_tensor(head).flatten().tolist()
            begins = [[*first, *self._ids(text)] for text in joined]
            users = _rows(user_ids, mask)
            count = max(len(begins), len(users))
            if {len(begins), len(users)} - {1, count}:
                raise ConfigError(f"Got {len(users)} rows of input_ids for {len(begins)} contexts.")
            begins = begins * (count // len(begins))
            rows = [b + u for b, u in zip(begins, users * (count // len(users)), strict=True)]
        with self._guard.lock:
            for begin in begins:
                self._known[tuple(begin)] = None
                self._known.move_to_end(tuple(begin))
            while len(self._known) > max(MAX_BINDINGS, len(begins)):
                self._known.popitem(last=False)
        return {**self._padded(rows), **public}

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        with without_length_warning(self._words()):
            ids: list[int] = self._words()(text=text, add_special_tokens=special).input_ids
        if not ids:
            raise ContextError("The released text has no token for this model: calibrate without such texts.")
        return ids

    def _start(self) -> list[int]:
        """What the tokenizer puts before every text."""
        first = self._words()(text="a").input_ids[:1]
        return first if first and first[0] == self._words().bos_token_id else []

    def _pad(self) -> int:
        named = (self._words().pad_token_id, self._words().eos_token_id)
        return next((int(p) for p in named if p is not None), 0)

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """On the left, or on the right for an encoder."""
        longest, pad = max(map(len, rows)), self._pad()

        def laid(row: list[int], fill: int) -> list[int]:
            gap = [fill] * (longest - len(row))
            return row + gap if self._seq2seq else gap + row

        ids = torch.tensor([laid(row, pad) for row in rows], device=self.model.device)
        mask = torch.tensor([laid([1] * len(row), 0) for row in rows], device=self.model.device)
        return {"input_ids": ids, "attention_mask": mask}


def _rows(ids: Any, mask: Any) -> list[list[int]]:
    """The user's own token ids, without padding. Raises ConfigError where they are none."""
    if ids is None:
        return [[]]
    tensor, mask = torch.as_tensor(ids), None if mask is None else torch.as_tensor(mask)
    tensor = tensor.unsqueeze(0) if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or tensor.is_floating_point() or (mask is not None and mask.shape != tensor.shape):
        raise ConfigError("`input_ids` must be integers [B, m], and `attention_mask` of the same shape.")
    kept = torch.ones_like(tensor) if mask is None else mask
    return [row[keep.bool()].tolist() for row, keep in zip(tensor, kept.to(tensor.device), strict=True)]
