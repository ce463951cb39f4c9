"""Texts as they enter: how bytes become text, what is no part of a text's name, and where a text is cut into records (units).

*Cut.* At the line feed alone. `str.splitlines` also cuts at form feeds, NEL, U+2028 and others, which stand within one record of many a
corpus: it would be two units, and a guarantee for one of them covers half of what was meant.
*Name.* A byte order mark at the start of a text or of one of its lines is left out, and of CR LF the CR: with them, one text had two
names and two budgets.
*Surrogates.* One that stands alone (of cut UTF-16, of `json.loads`, of file names) is U+FFFD: no tokenizer takes it, and that a text is
refused would be a fact about it.
Otherwise a text is read as it is. Composed and decomposed letters (NFC, NFD) stay what they are: most tokenizers give them other tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

from .errors import ConfigError
from .unquoted import unquoted

_LINE_ENDS = re.compile("\r+\n")  # all of them at once: what was read so is read so again
_SURROGATES = re.compile("[\ud800-\udfff]")
_MARKS = re.compile("^\ufeff+", re.MULTILINE)  # after a line feed only, as ^ is


def plain_text(text: str) -> str:
    """The text without byte order marks at the start of its lines, and without lone surrogates; CR LF is one line end, CR alone is none."""
    return _MARKS.sub("", _LINE_ENDS.sub("\n", _SURROGATES.sub("\ufffd", text)))


def decode_text(data: bytes) -> str:
    """The text of a file or of standard input: UTF-8, whatever the locale; as `plain_text` reads it.

    Raises:
        UnicodeDecodeError: no UTF-8. It holds the bytes: see `unquoted`.
    """
    return plain_text(data.decode("utf-8"))


def records_of(text: str) -> list[str]:
    """The records of a text: its lines, stripped, without empty ones."""
    return [record for line in plain_text(text).split("\n") if (record := line.strip())]


def read_records(file: str, option: str) -> list[str]:
    """The records of a text file that an option names.

    Raises:
        ConfigError: not readable, or nothing in it. The message quotes nothing.
    """
    texts = unquoted(
        lambda: records_of(decode_text(Path(file).read_bytes())),
        lambda kind: ConfigError(
            f"{option} takes the name of a text file in UTF-8, one text a line ({kind})."
        ),
        (OSError, UnicodeDecodeError),
    )
    if not texts:
        raise ConfigError(f"The file of {option} holds no text.")
    return texts
