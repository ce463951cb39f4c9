"""What the ledger knows contents by, the same on every kind of host: token ids and the texts that they are of.

*Conservative.* Hosts wrap one text in special tokens of their own, so ids are charged as they were given and as what stands between special
tokens. That may take two contexts for one (refused too early), never one for two.
"""

from __future__ import annotations

import dataclasses
import html
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from ..records import plain_text, records_of
from .context import Part, PrivateContext, plain_bytes
from .grouping import TEXT, Grouping

_SPECIAL = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "cls_token_id",
    "decoder_start_token_id",
)
TEXTS = (
    "`text` is the text that the token ids are of: a string, or a list with a string for each context; with units that are encoded apart, "
    "one for each of them (or a line). Nothing was spent."
)


# marks that choose how another letter is drawn, or join letters: most tokenizers drop them
_UNSEEN = dict.fromkeys(
    [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0x034F, *range(0x180B, 0x1810), 0x17B4, 0x17B5]
)


def name_of_ids(ids: torch.Tensor) -> tuple[bytes, ...]:
    """Of token ids [n], whatever their integer type."""
    return b"token ids", plain_bytes(ids)


def name_of_text(text: str) -> tuple[bytes, ...]:
    """The same under every tokenizer: two hosts need not tokenize or pad alike."""
    return TEXT, unicodedata.normalize("NFC", plain_text(text)).strip().encode("utf-8", "surrogatepass")


def folded_part(text: str, units: Sequence[str] | None) -> Part:
    """A prompt as pipelines may read it. Capitals, spaces, punctuation, wide letters, HTML entities, unseen characters often make no
    difference: its letters and digits alone.

    units: phrases that are encoded apart, or None.
    """
    apart = None if units is None else (b"phrases of a folded text", *map(_folded, units))
    return Part((b"folded text", _folded(text)), apart)


def _folded(text: str) -> bytes:
    seen = html.unescape(html.unescape(plain_text(text))).translate(_UNSEEN)
    plain = unicodedata.normalize("NFKC", seen).casefold()
    read = "".join(c for c in plain if unicodedata.category(c)[0] in "LNM")
    return (read or " ".join(plain.split())).encode("utf-8", "surrogatepass")


def filled(parts: Sequence[Part], count: int, name: tuple[bytes, ...]) -> list[Part]:
    """These names, and of the content's own so many that there are `count`: how many there are tells nothing of it.

    Args:
        parts: of one content; the further names have the last one's grouping.
        count: of different names.
        name: of the content.
    """
    known = list({part.name: part for part in parts}.values())
    units = known[-1].units if known else None
    more = [Part((b"further name", bytes([i]), *name), units) for i in range(count - len(known))]
    return [*known, *more]


def special_ids(model: Any) -> frozenset[int]:
    """The special token ids that a model of transformers names in its configurations."""
    model_config = getattr(model, "config", None)
    ids: set[int] = set()
    for config in (
        model_config,
        getattr(model_config, "text_config", None),
        getattr(model, "generation_config", None),
    ):
        for name in _SPECIAL:
            value = getattr(config, name, None)
            ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(ids)


def content_of(ids: torch.Tensor, special: Collection[int]) -> slice | None:
    """Where in ids [n] the content stands: all but special tokens at both ends; None where there is no other token."""
    others = [i for i, token in enumerate(ids.tolist()) if token not in special]
    return slice(others[0], others[-1] + 1) if others else None


def id_parts(
    ids: torch.Tensor, special: Collection[int], rows: Sequence[int] | None, units: Grouping | None = None
) -> tuple[Part, ...]:
    """Token ids [n] as they were given, and their content. rows: which private row each id is, negative where it is none; or units: see
    `Part`."""

    def part(where: slice) -> Part:
        held = None if rows is None else tuple(r for r in rows[where] if r >= 0)
        return Part(name_of_ids(ids[where]), units, held)

    content = content_of(ids, special)
    slices = [slice(0, len(ids))] if content is None else [slice(0, len(ids)), content]
    return tuple(dict.fromkeys(part(where) for where in slices))


def units_of_text(texts: Iterable[str]) -> Grouping:
    """The grouping of a text whose units are these texts, each encoded apart from the others."""
    return (b"phrases of a text", *(part for text in texts for part in name_of_text(text)))


def with_texts(contexts: Sequence[PrivateContext], text: Any, units: int | None) -> list[PrivateContext]:
    """The contexts, charged under the names of their texts as well. units: of how many ONE context consists that are encoded apart.

    Args:
        text: None; a text for each context; or a text for each unit, or the whole with a unit on each line. Each unit's is charged too.

    Raises:
        ConfigError: not so many texts; nothing was spent.
    """
    if text is None:
        return list(contexts)
    if units is None:
        texts = _texts(text, len(contexts))
        return [_more(c, [Part(name_of_text(t))]) for c, t in zip(contexts, texts, strict=True)]
    texts = _texts(records_of(text) if isinstance(text, str) else text, units)
    whole = text if isinstance(text, str) else "\n".join(texts)
    parts = [Part(name_of_text(whole), units_of_text(texts))]
    parts += [Part(name_of_text(t), units_of_text([t])) for t in texts]
    return [_more(c, parts) for c in contexts]


def _more(context: PrivateContext, parts: Sequence[Part]) -> PrivateContext:
    return dataclasses.replace(context, parts=(*context.parts, *parts))


def _texts(text: Any, count: int) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    if (
        not isinstance(texts, (list, tuple))
        or not all(isinstance(t, str) for t in texts)
        or len(texts) != count
    ):
        raise ConfigError(TEXTS)
    return list(texts)
