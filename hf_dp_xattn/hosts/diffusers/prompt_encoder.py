"""`PromptEncoder`: what any pipeline's `encode_prompt` makes of a text, and which of its outputs are rows, and a mask of rows.

Found out by a probe with two public texts. Private text is encoded here, alone, in silence and after its charge.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.utils.import_utils import is_bs4_available, is_ftfy_available

from ...errors import ConfigError, ContextError, TruncatedPromptWarning, UnsupportedModelError
from ...unquoted import unquoted
from ..content_names import filled, id_parts, name_of_text, units_of_text
from ..context import Part, PrivateContext, Rows, Trial, from_embeddings, plain_bytes
from ..placeholder import CODE_CHANNELS, Tag, holds_placeholder, make_placeholder, read_tags
from ..private_encoding import row_weights, token_counts, weighted
from ..private_run import private_run
from .phrases import check_phrases, split_phrases
from .prompt_readings import read_parts, tokenizers_of
from .text_side import TRUNCATED, all_ids, as_texts, tokenizer_fails, without_length_warning

STAND_IN = "a picture"
"""Public: what all of a pipeline but its protected layers sees in place of a private prompt."""
OTHER = "a dog in the rain"
OTHER_TEXTS = (OTHER, "a drawing", "a number")
"""The last two are mostly of as many tokens as the stand-in."""
METHODS = ("encode_prompt", "_encode_prompt")
_PROMPTS = re.compile(r"prompt(_[2-9])?")
_COUNTS = re.compile(r"num_\w+_per_prompt")
_OF_CALLS = re.compile(
    r"^(prompt(_[2-9])?|neg.*|device|do_.*|num_.*|true_cfg.*|guidance.*|.*embeds.*|.*mask.*|height|width|batch.*|.*max_.*)$"
)
"""What encode_prompt takes though it makes no other rows of a prompt, or only fewer."""


def method_of(pipe: Any) -> str:
    """The name of its `encode_prompt`. Raises UnsupportedModelError."""
    for name in METHODS:
        if callable(getattr(pipe, name, None)):
            return name
    raise UnsupportedModelError(
        f"{type(pipe).__name__} cannot be protected: it has no `encode_prompt`. With mechanism='library' every pipeline with a `prompt` "
        "can. Nothing was patched."
    )


def tensors_of(outputs: Any, where: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Each tensor of nested tuples and lists, and where it stands."""
    if isinstance(outputs, torch.Tensor):
        yield where, outputs
    elif isinstance(outputs, (tuple, list)):
        for i, inner in enumerate(outputs):
            yield from tensors_of(inner, (*where, i))


def is_rows(tensor: torch.Tensor) -> bool:
    """Whether it may be rows [B, n, C] of texts, and has room for a mark."""
    return tensor.ndim == 3 and tensor.is_floating_point() and tensor[0].numel() >= CODE_CHANNELS


def marks(tag: Tag, rows: torch.Tensor) -> torch.Tensor:
    """[n, C]: a placeholder as long as all of these rows; so that narrow ones have room for it."""
    return make_placeholder([tag], 1, rows.numel(), rows.dtype, rows.device).reshape(rows.shape)


def read_marks(states: torch.Tensor) -> list[Tag | None]:
    """The tag of each batch element. Raises as `placeholder.read_tags`."""
    return read_tags(states.flatten(1).unsqueeze(1))


def changed(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool [B]: which batch elements differ."""
    if one.shape != other.shape:
        return torch.ones(len(one), dtype=torch.bool, device=one.device)
    return (one != other).flatten(1).any(1)


class PromptEncoder:
    """Of one pipeline.

    Args:
        pipe: the pipeline.
        modules: its text encoders.
        channels: of a row where it enters the denoiser.

    padded: whether all prompts have the same number of rows, none of them masked. longest: how many tokens are read at most, where that is
    known.
    """

    stand_in: ClassVar[str] = STAND_IN
    others: ClassVar[tuple[str, ...]] = OTHER_TEXTS

    def __init__(self, pipe: Any, modules: Sequence[torch.nn.Module], channels: int) -> None:
        self._open(pipe, modules)
        self.channels = channels
        first, other = self._probe(self.stand_in), self._probe(self.others[0])
        at = dict(tensors_of(other))
        rows = [w for w, t in tensors_of(first) if is_rows(t) and bool(changed(t, at[w]).any())]
        if len(rows) != 1 or dict(tensors_of(first))[rows[0]].shape[-1] != channels:
            raise self._refuse(
                f"its encode_prompt gives {len(rows)} sequences of rows, where one is known how to release"
                if len(rows) != 1
                else f"its pipeline projects the encoded prompt to {channels} channels before its denoiser reads it"
            )
        self.where = rows[0]
        tensors = dict(tensors_of(first))
        self.rows = tensors[self.where].shape[1]
        masks = [
            w
            for w, t in tensors.items()
            if t.ndim == 2 and t.shape[1] == self.rows and bool(changed(t, at[w]).any())
            if is_mask(t)
        ]
        self.mask_at = masks[0] if len(masks) == 1 else None
        if len(masks) > 1:
            raise self._refuse(f"{len(masks)} masks of its encoded prompt depend on the prompt")
        fixed = tensors[self.where].shape == at[self.where].shape
        self.longest = self.rows if fixed else None
        self.padded = self.mask_at is None and fixed
        one, two = tensors[self.where][0], at[self.where][0]
        self.public_rows = int(self.padded and torch.equal(one[0], two[0]))
        self.first = one[: self.public_rows].detach().clone()

    def _open(self, pipe: Any, modules: Sequence[torch.nn.Module]) -> None:
        self.pipe, self.modules = pipe, tuple(modules)
        self.method = method_of(pipe)
        self._original = getattr(pipe, self.method)
        self._takes = inspect.signature(self._original).parameters
        self._as_called = inspect.signature(type(pipe).__call__).parameters

    def _refuse(self, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.pipe).__name__} cannot be protected: {reason}. With mechanism='library' every pipeline with a `prompt` can. "
            "Nothing was patched."
        )

    def _probe(self, text: str) -> Any:
        try:
            return self._encode(text)
        except Exception as error:
            raise self._refuse(
                f"its encode_prompt failed on a public text ({type(error).__name__})"
            ) from error

    @torch.no_grad()
    def _encode(self, text: str) -> Any:
        arguments: dict[str, Any] = {}
        for name, parameter in self._takes.items():
            if name == "prompt":
                arguments[name] = text
            elif name == "device":
                arguments[name] = self.pipe._execution_device
            elif name == "do_classifier_free_guidance":
                arguments[name] = False
            elif _COUNTS.fullmatch(name):
                arguments[name] = 1
            elif parameter.default is parameter.empty and _PROMPTS.fullmatch(name):
                arguments[name] = text
            elif "prompt" not in name and name in self._as_called:  # a call's own default: of the length, say
                default = self._as_called[name].default
                arguments[name] = parameter.default if default is parameter.empty else default
        with private_run(*self.modules), ExitStack() as stack:
            for tokenizer in self._tokenizers:
                stack.enter_context(without_length_warning(tokenizer))
            return self._original(**arguments)

    @property
    def _tokenizers(self) -> list[Any]:
        return list(tokenizers_of(self.pipe).values())

    def _ids(self, tokenizer: Any, texts: Sequence[str]) -> list[torch.Tensor]:
        """Token ids [n] of each text."""
        return [torch.tensor(all_ids(self.pipe, tokenizer, t), dtype=torch.int64) for t in texts]

    def _takes_plain(self, tokenizer: Any) -> bool:
        """Whether it is no processor, and none of chats."""
        try:
            return bool(self._ids(tokenizer, [self.stand_in]))
        except Exception:  # of a public text
            return False

    def _id_parts(self, texts: Sequence[str], whole: str, *, apart: bool) -> list[Part]:
        """The names of the ids that a text is of under each tokenizer; none where it takes no plain text. Warns where all cut it off.

        Raises:
            ContextError: a tokenizer fails on this text. Nothing was spent.
        """
        parts: list[Part] = []
        lengths = []
        for tokenizer in self._tokenizers:
            if not self._takes_plain(tokenizer):
                continue
            *each, ids = unquoted(partial(self._ids, tokenizer, (*texts, whole)), tokenizer_fails)
            grouping = (b"phrases of ids", *map(plain_bytes, each)) if apart else None
            special = frozenset(getattr(tokenizer, "all_special_ids", ()))
            parts += id_parts(ids, special, None, grouping)
            limit = min(self.rows, tokenizer.model_max_length)
            lengths.append((max(map(len, each)) if apart else len(ids)) > limit)
        if self.padded and lengths and all(lengths):
            warnings.warn(TRUNCATED, TruncatedPromptWarning, stacklevel=2)
        return filled(parts, 2 * len(self._tokenizers), name_of_text(whole))

    def changed_by(self, arguments: Mapping[str, Any]) -> str | None:
        """Which argument of a call is not its default, though encode_prompt takes it, and so makes other rows of a prompt."""
        for name in self._takes:
            if name == "clean_caption" and not (is_bs4_available() and is_ftfy_available()):
                continue  # diffusers cleans nothing then
            value = arguments.get(name)
            plain = isinstance(value, (bool, int, str, dict)) or (
                isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            )
            if plain and not _OF_CALLS.search(name) and value != self._as_called[name].default:
                return name
        return None

    # ---- as a calibration knows it by a public text (`identity.py`) --------------------------------------------------------

    available = True

    def tokenize(self, text: str) -> tuple[str]:
        """The text itself: tokens are made where it is encoded."""
        return (text,)

    def encode(self, text: str) -> torch.Tensor:
        """Rows [n, C] of a PUBLIC text."""
        return self.read(text)

    # ---- private text ------------------------------------------------------------------------------------------------------

    def read(self, text: str) -> torch.Tensor:
        """Rows [n, C] of a text: those that its mask shows, but for public ones at its start."""
        tensors = unquoted(
            lambda: dict(tensors_of(self._encode(text))),
            lambda kind: ContextError(f"The pipeline could not encode a prompt ({kind})."),
        )
        return self.whole(tensors)

    def whole(self, tensors: dict[tuple[int, ...], torch.Tensor], element: int = 0) -> torch.Tensor:
        """Rows [n, C] of one batch element as they are released."""
        return self.shown(tensors, element)[self.public_rows :]

    def shown(self, tensors: dict[tuple[int, ...], torch.Tensor], element: int) -> torch.Tensor:
        """Rows [n, C] of one batch element that its mask shows; of a text without tokens one of padding, since a release has rows.

        tensors: by where they stand.
        """
        rows = tensors[self.where][element]
        if self.mask_at is None or self.mask_at not in tensors:
            return rows
        shown = tensors[self.mask_at][element].to(rows.device) > 0
        return rows[shown] if bool(shown.any()) else rows[:1]

    def trial(self) -> Trial:
        return Trial("text", lambda: self.read(self.stand_in))

    def _context(self, text: str, units: Sequence[str] | None) -> PrivateContext:
        """units: phrases that are encoded apart, or None."""
        each = [text] if units is None else list(units)

        def load() -> Rows:
            return torch.cat([self.read(unit) for unit in each]), self.first

        count = (self.rows - self.public_rows) * len(each) if self.padded else 0
        groups = (
            None if units is None else torch.arange(len(each)).repeat_interleave(self.rows - self.public_rows)
        )
        parts = [] if units is None else [Part(name_of_text(text), units_of_text(each))]
        apart = units is not None
        parts += read_parts(self.pipe, each, text, apart=apart, longest=self.longest)
        parts += self._id_parts(each, text, apart=apart)
        name = (
            name_of_text(text)
            if units is None
            else (b"phrases of texts", *(p for u in each for p in name_of_text(u)))
        )
        return PrivateContext(
            count and self.rows,
            count,
            name,
            load,
            groups,
            parts=tuple(dict.fromkeys(parts)),
            padded=self.padded,
            trials=(self.trial(),),
            encoder=self.modules,
        )

    def _given(self, rows: torch.Tensor) -> PrivateContext:
        """Of embeddings [n, C]."""
        return from_embeddings(rows, self.channels)

    def weighted(self, texts: Sequence[str], weights: Sequence[float], *, apart: bool) -> PrivateContext:
        """ONE prompt of weighted parts. apart: each is encoded by itself, and is a unit; else a space joins them.

        Raises:
            ContextError, ConfigError: see `prompt_contexts.name_weighted`; or rows that are not the tokens'. Nothing was spent.
        """
        parts = check_phrases(texts)
        tokenizers = self._tokenizers
        if not self.padded or not tokenizers or any(t.model_max_length != self.rows for t in tokenizers):
            raise ConfigError(
                f"{type(self.pipe).__name__} has rows of text that are not the tokens of one tokenizer: weights are for Stable Diffusion "
                "(1, 2, XL and kin). Nothing was spent."
            )
        if apart:
            context, each = (
                self._context(", ".join(parts), parts),
                torch.tensor(weights).repeat_interleave(self.rows - self.public_rows),
            )
        else:
            context = self._context(" ".join(parts), None)
            found = [token_counts(partial(all_ids, self.pipe, tokenizer), parts) for tokenizer in tokenizers]
            if any(other != found[0] for other in found):
                raise ConfigError("The pipeline's tokenizers do not agree on these words. Nothing was spent.")
            counts, start = found[0]
            each = row_weights(counts, weights, start=start, rows=self.rows)[self.public_rows :]
        times = len(parts) if apart else 1
        return weighted(context, each, lambda: self.read("").repeat(times, 1))

    def name(self, context: Any, *, phrases: bool) -> list[PrivateContext]:
        """Validates and names a string, a list of strings, or embeddings [n, C] or [B, n, C].

        Raises:
            ContextError, ConfigError: it is none of these, or not valid. Nothing was spent.
        """
        if isinstance(context, torch.Tensor):
            if not context.is_floating_point() or context.ndim not in (2, 3) or holds_placeholder(context):
                raise ContextError("This host takes text, or embeddings [n, C] or [B, n, C].")
            return [self._given(rows) for rows in context.reshape(-1, *context.shape[-2:])]
        if not phrases:
            return [self._context(t, None) for t in as_texts(context, "context")]
        if not self.padded:
            raise ConfigError(
                "This pipeline's prompts have as many rows as tokens: it takes unit='row' or unit='context', or mechanism='library'."
            )
        return [self._context(t, check_phrases(split_phrases(t))) for t in as_texts(context, "context")]


def is_mask(tensor: torch.Tensor) -> bool:
    """Whether it may say which rows are of a text."""
    return bool(((tensor == 0) | (tensor == 1)).all())
