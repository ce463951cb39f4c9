"""Where a private context comes from on the command line: a file, standard input, or a hidden prompt. Never the argument list."""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path

from ..errors import ContextError
from ..records import decode_text, plain_text
from ..unquoted import unquoted

WHY = """\
The private context is read from a file, from standard input, or from a hidden prompt; it is never an argument. Arguments are private to
nobody: the shell keeps them in its history, every user of the machine sees them in the process table (ps), and jobs and containers log
them.
"""


LINES = """\
With --unit group a text for a transformers model has one segment (decoder-only) or document (encoder-decoder) on each line; empty lines are
left out. A line ends at a line feed (LF, or CR LF) and at nothing else. Each is encoded apart from the others, so that the promise for one
of them holds end to end.
"""


def add_private_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file with the private context, '-' for standard input (default: standard input where it is a pipe, else a hidden prompt)",
    )


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what a text is to a decoder-only model."""
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="decoder-only models: the private text is the content of the system message, and what the tokenizer's chat template puts "
        "before it is public; a release that was made so is also read so (default: with --mechanism library, where there is a template)",
    )
    parser.add_argument(
        "--prefix-bucket",
        type=int,
        metavar="N",
        help="decoder-only models: positions that the private text (with --unit group: each segment) takes, public (default: the next "
        "multiple of 64)",
    )


def _standard_input() -> str:
    """As from a file: the locale (C, in a container) would let other bytes through as lone surrogates. Without bytes, as it is."""
    raw = getattr(sys.stdin, "buffer", None)
    return sys.stdin.read() if raw is None else decode_text(raw.read())


def read_private_text(file: str | None) -> str:
    """The text, without its last line break. Raises ContextError, which quotes neither the text nor the file's name: it may be the text."""

    def read() -> str:
        if file is None and sys.stdin.isatty():
            return getpass.getpass("Private context (hidden): ")
        return _standard_input() if file in (None, "-") else decode_text(Path(str(file)).read_bytes())

    def failed(kind: str) -> ContextError:
        return ContextError(
            f"The private context cannot be read ({kind}); nothing was spent. --prompt-file takes the NAME of a text file in UTF-8, not "
            "the text."
        )

    text = unquoted(read, failed, (OSError, UnicodeDecodeError, EOFError))
    text = plain_text(text).removesuffix("\n")
    if not text.strip():
        raise ContextError("The private context is empty; nothing was spent.")
    return text
