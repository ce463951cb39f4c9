"""`hf-dp-xattn`: the command line. Each subcommand is a module of `commands/`."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .commands import audit_command as audit
from .commands import bench_command as bench
from .commands import calibrate_command as calibrate
from .commands import demo_command as demo
from .commands import generate_command as generate
from .commands import plan_command as plan
from .commands import push_command as push
from .commands import release_command as release
from .commands import report_command as report
from .commands.watching import STOPPED, CommandFailed, Stopped
from .errors import DPXAttnError

COMMANDS = (demo, plan, calibrate, release, generate, report, audit, bench, push)
FAILED = 1
BAD_INPUT = 2  # argparse's own code for a wrong usage, too
INTERRUPTED = 130  # as shells have it
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_DESCRIPTION = """\
Differentially private attention for Hugging Face models: a private context is released once as a noised structure, and every layer,
head, step and query reads that release and nothing else.
"""
_EPILOG = """\
start here:
  hf-dp-xattn demo                                    one public text at several epsilons (in a checkout; or name a model)
  hf-dp-xattn plan ./my-calibration --want-fvu 0.5    what would it cost to be useful? (spends nothing)
  hf-dp-xattn release ./my-pipeline --help            release a private context once; it is never an argument, and the help says why
  hf-dp-xattn generate ./my-pipeline --release ./release --out a.png    draw from it, as often as you like
  hf-dp-xattn report ./release                        what does this release promise?
  hf-dp-xattn audit ./my-pipeline --help              try to break it on your own model, before you trust it
  hf-dp-xattn COMMAND --help                          options and examples of a command

exit codes: 0 done; 1 the answer is no, or it failed after a charge (see the command's help); 2 bad input, with a message on stderr;
130 stopped by Ctrl-C before anything was spent.
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
        one = subparsers.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.DESCRIPTION,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=getattr(
                command, "ABBREVIATES", False
            ),  # --prompt must not be taken for --prompt-file
        )
        command.add_options(one)
        one.add_argument("--json", action="store_true", help="print JSON in place of text, and no progress")
        one.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns its exit code. The package's own errors, and files that cannot be written, are told in one line;
    anything else is a bug and raises."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # argparse would print them, and one may be a prompt
        parser.error(
            f"{len(unknown)} argument(s) not understood (not shown: they may be private); see --help"
        )
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return _fail(STOPPED, INTERRUPTED)
    except DPXAttnError as error:
        code = FAILED if isinstance(error, CommandFailed) else BAD_INPUT
        return _fail(str(error), INTERRUPTED if isinstance(error, Stopped) else code)
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        name = "" if error.filename is None else f" {Path(str(error.filename)).name!r}"
        return _fail(f"Nothing can be written to{name or ' the disk'}: {error.strerror}.", FAILED)


def _fail(message: str, code: int) -> int:
    print(f"hf-dp-xattn: {message}", file=sys.stderr)
    return code
