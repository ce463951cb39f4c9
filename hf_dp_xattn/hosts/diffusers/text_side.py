"""The text side of a Stable Diffusion pipeline: tokens, private and public encodings, and which rows are public.

Private prompts are tokenised and encoded here, not by `pipe.encode_prompt`: that one logs the words which it truncates.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import ConfigError, ContextError, TruncatedPromptWarning
from ...records import plain_text
from ...unquoted import unquoted
from ..context import Trial
from ..lengths import dimensions
from ..private_run import private_run
from .architectures import unwrap

# Two public texts; a row that is the same for both does not depend on the prompt.
NO_LENGTH = 10**6  # transformers' stand-in for a missing model_max_length is far above
_PROBES = ("", "a photograph of a red apple")
TRUNCATED = (
    "A private prompt (or phrase) is longer than the text encoder reads: its end was left out, is not in the release and changes nothing. "
    "Shorten it, or split it into phrases. Where others read your logs, silence this warning (dpx.TruncatedPromptWarning): it tells that "
    "the prompt is long."
)


class TextSide:
    """Tokenizer and text encoder of one pipeline.

    first_row_is_public: with a causal encoder the first row (BOS) sees no word of the prompt, so it need not be released.
    Found out by a probe with two public texts.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.encoder = pipe.text_encoder
        self.tokenizer = pipe.tokenizer
        self.first_row_is_public = False
        if self.available:
            self._check_tokenizer()
            ids, masks = zip(*(self.tokenize(p) for p in _PROBES), strict=True)
            same_token = bool(ids[0][0] == ids[1][0])
            rows = [self.encode(i, m)[0] for i, m in zip(ids, masks, strict=True)]
            self.first_row_is_public = same_token and torch.equal(rows[0], rows[1])
            self._first_token = int(ids[0][0])

    @property
    def available(self) -> bool:
        return self.encoder is not None and self.tokenizer is not None

    @property
    def length(self) -> int:
        return int(self.tokenizer.model_max_length)

    @property
    def limit(self) -> int | None:
        """How many tokens the encoder takes; None if it names no limit."""
        return getattr(self.encoder.config, "max_position_embeddings", None)

    def _check_tokenizer(self) -> None:
        """Raises ConfigError unless every text can be padded to one length that the text encoder takes."""
        limit = self.limit
        takes = f"the text encoder takes {limit} tokens" if limit else "choose how many tokens a prompt has"
        if self.length > (limit or NO_LENGTH):
            has = "no maximal length" if self.length > NO_LENGTH else f"model_max_length = {self.length}"
            raise ConfigError(
                f"The tokenizer has {has}, and {takes}: set pipe.tokenizer.model_max_length, then protect. Nothing was patched."
            )
        if self.tokenizer.pad_token is None:
            raise ConfigError(
                "The tokenizer has no pad token, so prompts cannot be padded to one public length: set pipe.tokenizer.pad_token (to its "
                "eos_token, say), then protect. Nothing was patched."
            )

    @property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """What makes rows of tokens."""
        return (unwrap(self.encoder),)

    def mask_seen(self, mask: torch.Tensor | None) -> bytes:
        """A mask [length] as far as it takes part in the encoding."""
        used = mask is not None and getattr(self.encoder.config, "use_attention_mask", None)
        return bytes(mask.to(torch.uint8).tolist()) if mask is not None and used else b""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokens that the tokenizer puts around a text."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
        return frozenset(i for name in names if (i := getattr(self.tokenizer, name, None)) is not None)

    def require(self) -> None:
        if not self.available:
            raise ConfigError(
                "This pipeline has no text encoder or tokenizer; release embeddings instead of text."
            )

    def tokenize(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask [length], padded and truncated without a word in the logs."""

        def run() -> Any:
            with without_length_warning(self.tokenizer):
                plain = text
                if hasattr(self.pipe, "maybe_convert_prompt"):  # textual inversion
                    plain = self.pipe.maybe_convert_prompt(text, self.tokenizer)
                return self.tokenizer(
                    [plain],
                    padding="max_length",
                    max_length=self.length,
                    truncation=True,
                    return_tensors="pt",
                )

        tokens = unquoted(run, tokenizer_fails)
        return tokens.input_ids[0], tokens.attention_mask[0]

    def tokenize_private(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`tokenize`, with a warning where it cuts something off. The warning holds no content, but is a fact about the prompt."""
        tokens = self.tokenize(text)
        if len(self.token_ids(text)) > self.length:
            warnings.warn(TRUNCATED, TruncatedPromptWarning, stacklevel=2)
        return tokens

    def token_ids(self, text: str) -> list[int]:
        """Of a text as long as it is."""
        return all_ids(self.pipe, self.tokenizer, text)

    def pad_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Checks token ids [n] and pads them to the public length.

        Raises:
            ContextError: wrong dtype, rank, length or range, or another first token than the one that is public.
        """
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ContextError(f"Token ids must be an integer tensor [n] or [B, n], got {dimensions(ids)}.")
        if not 0 < ids.shape[0] <= self.length:
            raise ContextError(
                f"This text encoder takes 1 to {self.length} token ids, and was given another number."
            )
        ids = ids.to("cpu", torch.int64)
        vocabulary = self.encoder.get_input_embeddings().num_embeddings
        if bool(((ids < 0) | (ids >= vocabulary)).any()):
            raise ContextError(f"Token ids must lie in [0, {vocabulary}).")
        if self.first_row_is_public and int(ids[0]) != self._first_token:
            raise ContextError(
                f"Token ids must start with the tokenizer's first token (id {self._first_token}), which is public."
            )
        pad = self.tokenizer.pad_token_id
        return torch.nn.functional.pad(ids, (0, self.length - ids.shape[0]), value=0 if pad is None else pad)

    @torch.no_grad()
    def encode(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids [length] -> rows [length, C]. Each prompt is encoded by itself, so that no other one can change its rounding."""
        self.require()
        device = self.pipe._execution_device
        use_mask = getattr(self.encoder.config, "use_attention_mask", None)
        attention_mask = mask.unsqueeze(0).to(device) if use_mask and mask is not None else None
        with private_run(unwrap(self.encoder)):
            return self.encoder(ids.unsqueeze(0).to(device), attention_mask=attention_mask)[0][0]

    def trial(self) -> Trial:
        """The encoding of a public text: all texts are padded to one length."""
        return Trial("text", lambda: self.encode(*self.tokenize(_PROBES[0])))

    def private_rows(self, ids: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(private rows, exact public rows): the first row comes from a public text, never from the private encoding."""
        rows = self.encode(ids, mask)
        if not self.first_row_is_public:
            return rows, rows[:0]
        return rows[1:], self.public_first_row()

    def public_first_row(self) -> torch.Tensor:
        """[1, C], or [0, C] where the first row sees the prompt; from a public text, never from a private encoding."""
        return self.encode(*self.tokenize(_PROBES[0]))[: int(self.first_row_is_public)]

    def public_rows(self, text: str) -> torch.Tensor:
        """Rows [p, C] of a public text, encoded by itself: its words and its end, not the padding.

        Raises:
            ConfigError: it spells the end token, so that the words behind it would be left out.
        """
        spelt = getattr(self.tokenizer, "eos_token", None) or getattr(self.tokenizer, "sep_token", None)
        if spelt and spelt in text:
            raise ConfigError(
                f"A public text holds {spelt!r}, which ends a text for this tokenizer: the words behind it would be left out. Leave it out."
            )
        ids, mask = self.tokenize(text)
        start = 1 if self.first_row_is_public else 0
        end = self.tokenizer.eos_token_id
        end = self.tokenizer.sep_token_id if end is None else end  # BERT's
        ends = [] if end is None else (ids[1:] == end).nonzero().flatten().tolist()
        stop = ends[0] + 2 if ends else int(mask.sum())
        return self.encode(ids, mask)[start:stop]


def tokenizer_fails(kind: str) -> ContextError:
    """kind: the class of what it raised on a private text, whose words may quote it."""
    return ContextError(f"The tokenizer failed on a prompt ({kind}); nothing was spent.")


@contextmanager
def without_length_warning(tokenizer: Any) -> Iterator[None]:
    """Keeps transformers from logging how long a private text is; it warns once per tokenizer, by this flag."""
    flags = getattr(tokenizer, "deprecation_warnings", {})
    before = dict(flags)
    flags["sequence-length-is-longer-than-the-specified-maximum"] = True
    try:
        yield
    finally:
        flags.clear()
        flags.update(before)


def all_ids(pipe: Any, tokenizer: Any, text: str) -> list[int]:
    """Of a text as long as it is, as a pipeline tokenizes it."""
    with without_length_warning(tokenizer):
        if hasattr(pipe, "maybe_convert_prompt"):  # textual inversion
            text = pipe.maybe_convert_prompt(text, tokenizer)
        return list(tokenizer([text]).input_ids[0])


def as_texts(prompt: Any, name: str) -> Sequence[str]:
    """A string or list of strings as a list, without byte order marks; the message names types only."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(t, str) for t in texts):
        raise ConfigError(
            f"`{name}` must be a string or a non-empty list of strings, got {type(prompt).__name__}."
        )
    return [plain_text(text) for text in texts]
