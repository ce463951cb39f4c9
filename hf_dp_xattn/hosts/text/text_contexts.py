"""Private texts in units: cut by a public rule, named for the ledger, and encoded unit by unit after the charge.

*Name.* A text is charged under the name that it has on every host (`content_names.name_of_text`), with the units that it was cut in, and so
is each unit where units are lines, segments or documents. Where a text is cut, and so how many units it has, is public.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import ConfigError, ContextError
from ...records import plain_text, records_of
from ..content_names import name_of_text, units_of_text
from ..context import Part, PrivateContext, Rows, Trial
from ..diffusers.phrases import split_phrases
from .unit_encoders import UnitEncoder

MOST = 2**17  # units of a context
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text: cut behind a full stop, question or exclamation mark that a space follows, and at line feeds."""
    return [part for piece in _SENTENCE.split(plain_text(text)) if (part := piece.strip())]


def _whole(text: str) -> list[str]:
    stripped = plain_text(text).strip()
    return [stripped] if stripped else []


# how a text is cut in units, what joins their answers, and where that is, in words
CUTS: dict[str, tuple[Callable[[str], list[str]], str, str]] = {
    "context": (_whole, "\n", "nowhere"),
    "documents": (records_of, "\n", "at line feeds"),
    "lines": (records_of, "\n", "at line feeds"),
    "phrases": (
        split_phrases,
        ", ",
        "at commas, semicolons, line breaks and the word 'and', but not within 1,000 or black-and-white",
    ),
    "segments": (records_of, "\n", "at line feeds"),
    "sentences": (
        split_sentences,
        " ",
        "behind full stops, question and exclamation marks, and at line feeds",
    ),
}


class Cut:
    """How one library's contexts are cut. Raises ConfigError where the rule is not known."""

    def __init__(self, grouping: str) -> None:
        if grouping not in CUTS:
            raise ConfigError(f"Contexts are cut in {', '.join(CUTS)}, not in {grouping!r}.")
        self.grouping = grouping
        self._split, self.joint, self.words = CUTS[grouping]

    def __call__(self, context: Any) -> tuple[list[str], str]:
        """(units, whole text) of ONE context: a string that is cut, or a list of units.

        Raises:
            ContextError: no units, too many, an empty one, or something else than strings. Nothing was spent; the message quotes nothing.
        """
        if isinstance(context, str):
            units, whole = self._split(context), plain_text(context).strip()
        elif isinstance(context, (list, tuple)) and all(isinstance(unit, str) for unit in context):
            units = [plain_text(unit).strip() for unit in context]
            whole = self.joint.join(units)
            units = units if self.grouping != "context" else [whole] if all(units) and units else []
        else:
            raise ContextError(
                f"A private context is a string, or a list of strings that are its units, got {type(context).__name__}; nothing was spent."
            )
        if not 0 < len(units) <= MOST or not all(units):
            raise ContextError(
                f"A private context has 1 to {MOST} units, none of them empty: this one is empty, has an empty unit, or has too many. "
                "Nothing was spent."
            )
        return units, whole


def name_text(
    units: Sequence[str],
    whole: str,
    encoder: UnitEncoder | None,
    *,
    grouped: bool,
    each: bool,
    others: Sequence[Part] = (),
) -> PrivateContext:
    """A context of units that are encoded one by one.

    Args:
        units: stripped, none of them empty. whole: the text that they are of.
        encoder: None where none is at hand, and no release can be made.
        grouped: units are groups; else the context is one unit.
        each: every unit is charged under its own name as well.
        others: further names, of token ids that were given in place of a text.
    """
    texts = tuple(units)

    def load() -> Rows:
        if encoder is None:
            raise ConfigError("There is no library at hand.")
        codes = encoder(texts)
        return codes, codes[:0]

    apart = units_of_text(texts) if grouped else None
    parts = [Part(name_of_text(whole), apart), *others]
    if each:
        parts += [Part(name_of_text(t), units_of_text([t]) if grouped else None) for t in texts]
    return PrivateContext(
        rows=len(texts),
        private_rows=len(texts),
        name=(b"texts", *(part for t in texts for part in name_of_text(t))),
        load=load,
        phrases=torch.arange(len(texts)) if grouped else None,
        parts=tuple(parts),
        padded=True,
        trials=() if encoder is None else (Trial("text", encoder.trial),),
    )
