"""`hf-dp-xattn`: the command line. Each subcommand is a module of `commands/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__
from .commands import plan
from .errors import DPXAttnError

COMMANDS = (plan,)
BAD_INPUT = 2  # argparse's own code for a wrong usage, too
_DESCRIPTION = """\
Differentially private attention for Hugging Face models: a private context is released once as a noised structure, and every layer,
head, step and query reads that release and nothing else.
"""
_EPILOG = """\
start here:
  hf-dp-xattn plan ./my-calibration --want-fvu 0.5    what would it cost to be useful? (spends nothing)
  hf-dp-xattn COMMAND --help                          options and examples of a command

exit codes: 0 done; 1 the answer is no (see the command's help); 2 bad input, with a message on stderr.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-dp-xattn",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-dp-xattn {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code. The package's own errors are told in one line, anything else is a bug and raises."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DPXAttnError as error:
        print(f"hf-dp-xattn: {error}", file=sys.stderr)
        return BAD_INPUT
