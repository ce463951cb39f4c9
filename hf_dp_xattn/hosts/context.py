"""Private contexts before their release: validated and named (for the ledger), not yet encoded."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import ConfigError, ContextError, DPXAttnError
from ..records import plain_text
from .diffusers.phrases import check_phrases, encode_tokens, split_phrases
from .diffusers.text_side import TextSide, as_texts
from .grouping import Grouping, canonical, partition
from .lengths import dimensions
from .placeholder import holds_placeholder
from .rehearsal import Trial

Rows = tuple[torch.Tensor, torch.Tensor]  # private [n, C], exact public [p, C]


class Part(NamedTuple):
    """A name that is charged. units: what is a unit of it, where groups are units; None: the context's own groups."""

    name: tuple[bytes, ...]
    units: Grouping | None = None


@dataclass(frozen=True)
class PrivateContext:
    """One context. `name` is what the ledger digests; `load` encodes and may be called only after the charge.

    rows counts all rows of the placeholder, public ones included; private_rows those that are released. padded: `rows` is a public number
    whatever the content (else see `lengths.public_length`). phrases: the groups of the private
    rows where they are phrases; public. variant: how it is encoded: another variant is not served by the same release, but charged to the
    same name. parts: names of the documents that it consists of, or of the text that it was given as or that its phrases are of; they are
    charged as well. trials: encodings of public stand-ins, to be tried before the charge. encoder: the modules that encode it; () where it
    was given encoded. kept: bool, which of all positions are private rows, where not all are; public. ambiguous: a number of positions that
    is not theirs but that of what was given before it was padded.
    """

    rows: int
    private_rows: int
    name: tuple[bytes, ...] = field(repr=False)
    load: Callable[[], Rows] = field(repr=False, compare=False)
    phrases: torch.Tensor | None = field(default=None, repr=False, compare=False)
    variant: bytes = field(default=b"", repr=False)
    parts: tuple[Part, ...] = field(default=(), repr=False)
    padded: bool = False
    trials: tuple[Trial, ...] = field(default=(), repr=False, compare=False)
    kept: torch.Tensor | None = field(default=None, repr=False, compare=False)
    ambiguous: int | None = field(default=None, repr=False)
    encoder: tuple[Any, ...] = field(default=(), repr=False, compare=False)

    def charged(self, groups: torch.Tensor | None) -> tuple[Part, ...]:
        """All that is charged, and which rows of it are a unit; groups: as `groups` gave them."""
        if groups is None:
            return tuple(Part(p.name) for p in (Part(self.name), *self.parts))
        own = partition(groups, apart=self.phrases is not None)
        return Part(self.name, own), *(Part(p.name, own if p.units is None else p.units) for p in self.parts)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise DPXAttnError("A private context cannot be pickled or copied.")

    def groups(self, groups: torch.Tensor | None, unit: str) -> torch.Tensor | None:
        """Groups of the private rows, from labels of exactly these, or of all positions (padding and public ones included).

        Raises:
            ContextError: they do not fit; ConfigError: the unit needs them and they are missing, or the reverse.
        """
        if (unit == "group") != (groups is not None or self.phrases is not None):
            need = "needs" if unit == "group" else "is the only one that takes"
            raise ConfigError(
                f"unit='group' {need} `groups`: protected.release(context, groups=...). The unit is {unit!r}."
            )
        if groups is None:
            return self.phrases
        if not self.private_rows:
            raise ContextError(
                "How many rows this context has is known when it is encoded only, so that its rows cannot be named in groups: encode it "
                "yourself and release the rows. Nothing was spent."
            )
        whole = self.private_rows if self.kept is None else len(self.kept)
        integers = (
            isinstance(groups, torch.Tensor)
            and not groups.is_floating_point()
            and not groups.is_complex()
            and groups.dtype != torch.bool
        )
        if not integers or groups.ndim != 1 or len(groups) not in (self.private_rows, whole):
            raise ContextError(
                "`groups` must be an integer tensor [n], a number for each private row, or for each of all positions; nothing was spent."
            )
        if len(groups) == whole:
            return groups if self.kept is None else groups[self.kept.to(groups.device)]
        if len(groups) == self.ambiguous:
            raise ContextError(
                "These `groups` may be of the tokens as given, or of the private rows behind the public first one: pass a number for each "
                "position, padding included; nothing was spent."
            )
        return groups

    def variant_of(self, groups: torch.Tensor | None) -> bytes:
        """What tells a release from another one of the same context: how it was encoded and grouped."""
        return self.variant + (b"" if groups is None else plain_bytes(canonical(groups)))


def plain_bytes(tensor: torch.Tensor) -> bytes:
    """The same for equal numbers, whatever their type (-0.0 equals 0.0)."""
    floating = tensor.is_floating_point()
    plain = tensor.detach().to("cpu", torch.float32 if floating else torch.int64)
    return (plain + 0.0 if floating else plain).contiguous().numpy().tobytes()


def _name_of_ids(ids: torch.Tensor) -> tuple[bytes, ...]:
    return b"token ids", plain_bytes(ids)


def _name_of_text(text: str) -> tuple[bytes, ...]:
    """The same under every tokenizer: two pipelines need not pad alike."""
    return b"text", unicodedata.normalize("NFC", plain_text(text)).strip().encode("utf-8", "surrogatepass")


def from_ids(
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    text: TextSide,
    whole: str | None = None,
    *,
    given: int | None = None,
) -> PrivateContext:
    """A context given by padded token ids [length]; whole: the text that they are of, which is charged as well. given: how many ids there
    were before."""

    def load() -> Rows:
        return text.private_rows(ids, mask)

    rows, first = ids.shape[0], int(text.first_row_is_public)
    return PrivateContext(
        rows,
        rows - first,
        _name_of_ids(ids),
        load,
        variant=text.mask_seen(mask),
        parts=() if whole is None else (Part(_name_of_text(whole)),),
        padded=True,
        trials=(text.trial(),),
        kept=torch.arange(rows) >= first,
        ambiguous=given,
        encoder=text.modules,
    )


def from_phrases(phrases: Sequence[object], text: TextSide, whole: str | None = None) -> PrivateContext:
    """A context of phrases that are encoded one by one, named by them, whatever stood between. The whole text is charged as well: `whole`,
    or the phrases with commas between; as far as the encoder reads it.

    Raises:
        ContextError: see `check_phrases`.
    """
    texts = check_phrases(phrases)
    tokens = [text.tokenize_private(phrase) for phrase in texts]
    given = ", ".join(texts) if whole is None else whole
    ids, _ = text.tokenize(given)

    def load() -> Rows:
        return torch.cat(encode_tokens(text, tokens)), text.public_first_row()

    each = text.length - int(text.first_row_is_public)
    groups = torch.arange(len(tokens)).repeat_interleave(each)
    name = (b"phrases", *(plain_bytes(t) for t, _ in tokens))
    spoken = (b"phrases of a text", *(part for phrase in texts for part in _name_of_text(phrase)))
    parts = (Part(_name_of_ids(ids), name), Part(_name_of_text(given), spoken))
    trials = (text.trial(),)
    return PrivateContext(
        text.length,
        len(groups),
        name,
        load,
        groups,
        parts=parts,
        padded=True,
        trials=trials,
        encoder=text.modules,
    )


def from_embeddings(rows: torch.Tensor, channels: int) -> PrivateContext:
    """A context given by embeddings [n, C]; all n rows are private.

    Raises:
        ContextError: wrong rank or channels, no rows, NaN or Inf.
    """
    if rows.ndim != 2 or rows.shape[-1] != channels:
        raise ContextError(
            f"Embeddings must be [n, {channels}] or [B, n, {channels}], got {dimensions(rows)}, the last of size {rows.shape[-1]}."
        )
    if rows.shape[0] == 0:
        raise ContextError("The context has no rows (n = 0): there is nothing to release.")
    if not bool(torch.isfinite(rows).all()):
        raise ContextError("The embeddings hold NaN or Inf; nothing was spent.")
    kept = (
        rows.detach().clone()
    )  # what was named is what is released, whatever becomes of the caller's tensor

    def load() -> Rows:
        return kept, kept[:0]

    return PrivateContext(rows.shape[0], rows.shape[0], (b"embeddings", plain_bytes(kept)), load)


def name_phrases(context: Any, text: TextSide | None) -> PrivateContext:
    """Validates and names ONE context: a list of phrases, or a string that is split into them.

    Raises:
        ContextError: it is neither, or a phrase is empty, or there are none or too many. Nothing was spent.
    """
    if not isinstance(context, (str, list, tuple)):
        raise ContextError(
            f'groups="phrases" takes a string or a list of strings, got {type(context).__name__}; nothing was spent.'
        )
    side = _require(text)
    if isinstance(context, str):
        return from_phrases(split_phrases(context), side, context)
    return from_phrases(context, side)


def name_contexts(
    context: Any, text: TextSide | None, channels: int, *, phrases: bool = False
) -> list[PrivateContext]:
    """Validates and names `context`: a string, list of strings, token ids [n] / [B, n], or embeddings [n, C] / [B, n, C].

    phrases: each string is a context that is split into phrases.

    Raises:
        ContextError, ConfigError: it is none of these, or not valid. Nothing was spent.
    """
    if isinstance(context, torch.Tensor):
        if context.ndim == 0 or context.shape[0] == 0:
            raise ContextError("The context is empty.")
        if context.is_floating_point():
            if context.ndim not in (2, 3):
                raise ContextError(f"Embeddings must be [n, C] or [B, n, C], got {dimensions(context)}.")
            batch = context if context.ndim == 3 else context.unsqueeze(0)
            if holds_placeholder(batch):
                raise ContextError(
                    "This is a placeholder of a release, not a context; pass it as prompt_embeds."
                )
            return [from_embeddings(rows, channels) for rows in batch]
        if context.ndim not in (1, 2):
            raise ContextError(f"Token ids must be [n] or [B, n], got {dimensions(context)}.")
        ids = context if context.ndim == 2 else context.unsqueeze(0)
        side = _require(text)
        return [from_ids(side.pad_ids(row), None, side, given=len(row)) for row in ids]
    texts = as_texts(context, "context")
    side = _require(text)
    if phrases:
        return [from_phrases(split_phrases(t), side, t) for t in texts]
    return [from_ids(*side.tokenize_private(t), side, t) for t in texts]


def _require(text: TextSide | None) -> TextSide:
    if text is None:
        raise ContextError(
            "This host has no text encoder: release embeddings [n, C] or [B, n, C] instead of text or ids."
        )
    text.require()
    return text
