"""`hf-dp-xattn release`: releases one private context once, and writes the release to a folder."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BudgetExceededError, ConfigError
from .models import add_protection, driver_of, protected_model, quiet
from .private_text import LINES, WHY, add_private_text, add_text_options, read_private_text
from .watching import Stage, watching

if TYPE_CHECKING:
    from ..hosts.driver import Driver
    from .watched_ledger import WatchedLedger

NAME = "release"
HELP = "release a private context once and write it to a folder"
REFUSED = 1
DESCRIPTION = f"""\
Releases a private context once, with noise, and writes the release: any number of pictures or texts can then be made from it, on any
machine, and nothing else of the context leaves. The ledger is charged before the context is encoded; the same context twice is refused
where that exceeds its budget. Without --ledger that is one file for all that you release from the command line.

{WHY}
{LINES}"""
EXAMPLES = """\
examples:
  a hidden prompt asks for the text:
    hf-dp-xattn release ./my-pipeline --config ./my-config --calibration ./my-calibration --ledger ledger.json --out ./release
  from a file, or from a program:
    hf-dp-xattn release ./my-protected-pipeline --prompt-file prompt.txt --ledger ledger.json --out ./release
    pass show prompt | hf-dp-xattn release ./my-bart --mechanism kernel_sum --epsilon 8 --ledger ledger.json --out ./release --json
  a system prompt of a chat model, one rule or fact a line; each line is a unit, and the template's fixed words stay exact:
    hf-dp-xattn release examples/chat/model --mechanism anchors --unit group --epsilon 8 --chat --prefix-bucket 64 \\
      --calibration examples/chat/calibrations/group --prompt-file rules.txt --ledger ledger.json --out ./release
  a corpus for an encoder-decoder model, one document a line:
    hf-dp-xattn release examples/rag/model --mechanism anchors --unit group --epsilon 8 --prompt-file corpus.txt \\
      --calibration examples/rag/calibrations/anchors-group-64 --ledger ledger.json --out ./release
  then, in Python:
    release = dpx.Release.from_pretrained("./release", host=pipe); pipe(**release.inputs())

exit codes: 0 done; 1 the ledger refuses and nothing was released, or something failed after the charge (the message on stderr says which,
and whether the release was kept); 2 bad input, nothing was spent (the message is on stderr); 130 stopped by Ctrl-C before anything was
spent.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    add_releasing(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the release")


def run(args: argparse.Namespace) -> int:
    """Writes the release and prints its report; 1 where the ledger refuses, or after a charge something fails."""
    with new_folder(Path(args.out)) as out:
        text = read_private_text(args.prompt_file)
        if args.json:
            quiet()
        say(args, "loading the model")
        ledger = open_ledger(args)
        handle = protected_model(args, ledger)
        driver = driver_of(handle, args)
        say(args, "releasing")
        with watching(ledger, Stage("Releasing")) as stage:
            release = release_or_refuse(driver, text)
            if release is None:
                return REFUSED
            keep(release, out, stage)
            stage.doing = "Printing the report"
            report = handle.report()
            if args.json:
                values = {
                    "folder": str(out),
                    "ledger": str(ledger.path or ledger.place),
                    "report": report.to_dict(),
                }
                print(json.dumps(values, sort_keys=True))
            else:
                print(f"{report}\ncharged to {ledger.path or ledger.place}\nwrote {out}")
    return 0


def keep(release: Any, out: Path, stage: Stage) -> None:
    """Writes a release that was just made. The private text takes no part any more."""
    stage.doing, stage.private = "Writing the release", False
    release.save_pretrained(out)
    stage.kept = str(out)


def add_releasing(parser: argparse.ArgumentParser) -> None:
    """The options of a command that releases a private text."""
    add_protection(parser)
    add_private_text(parser)
    add_text_options(parser)
    parser.add_argument(
        "--budget",
        type=float,
        metavar="E",
        help="epsilon that one context may spend in all its releases together (default: one release)",
    )
    parser.add_argument(
        "--ledger",
        metavar="FILE",
        help="file that counts what each context has spent; made if needed (default: the one that HF_DP_XATTN_LEDGER names, else "
        "hf_dp_xattn/ledger.json in your cache folder; its path is printed)",
    )


def open_ledger(args: argparse.Namespace) -> WatchedLedger:
    """The ledger that is charged: told on stderr, so that it is known which file must be kept."""
    from ..privacy.default_ledger import user_ledger_path
    from .watched_ledger import WatchedLedger

    ledger = WatchedLedger(user_ledger_path() if args.ledger is None else args.ledger)
    print(
        f"ledger: {ledger.path or ledger.place} (what contexts have spent; keep it and its .key)",
        file=sys.stderr,
    )
    return ledger


def release_or_refuse(driver: Driver, text: str) -> Any | None:
    """The release, or None where the ledger refuses, with its reason on stderr."""
    try:
        return driver.release_text(text)
    except BudgetExceededError as error:
        print(f"hf-dp-xattn: {error}", file=sys.stderr)
        return None


@contextmanager
def new_folder(out: Path, *, but: str | None = None) -> Iterator[Path]:
    """Makes the folder of what will be made, before anything is spent; what is still empty at the end goes again.

    Args:
        out: the folder. but: it must be empty, but for an entry of this name; None: it must hold no release.

    Raises:
        ConfigError: it holds something already, or cannot be made or written to.
    """
    from ..hosts.storage import JSON_NAME

    if but is None and (out / JSON_NAME).exists():
        raise ConfigError(
            f"There is a release in {out.name!r} already; choose a new folder. Nothing was spent."
        )
    if but is not None and out.exists() and (not out.is_dir() or {p.name for p in out.iterdir()} - {but}):
        raise ConfigError(f"{out.name!r} exists and is not an empty folder; choose a new one.")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{out.name!r} cannot be made ({type(error).__name__}). Nothing was spent."
            ) from None
        if not os.access(out, os.W_OK | os.X_OK):
            raise ConfigError(f"Nothing can be written to {out.name!r}. Nothing was spent.")
        yield out
    finally:
        with suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def say(args: argparse.Namespace, what: str) -> None:
    """Progress on stderr, unless a program reads along."""
    if not args.json:
        print(f"{what} ...", file=sys.stderr, flush=True)
