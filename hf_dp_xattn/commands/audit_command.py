"""`hf-dp-xattn audit`: leak tests, an empirical epsilon and an extraction, against a protection on one's own model."""

from __future__ import annotations

import argparse
import warnings

from .models import add_protection
from .release_command import say
from .trial_hosts import load_trial, read_texts

NAME = "audit"
HELP = "try to break a protection on your own model; spends nothing"
FAILED = 1
DESCRIPTION = """\
Tries to break a protection on your own model, with canaries (random words), before you trust it with anything private:

  leaks        the release held fixed, two canaries must give bitwise equal outputs; no module may be given a private row; a layer that lost
               its processor must stop the host or give NaN; a second release must be charged; unprotect must give the host back bit for bit
  releases     how far apart two neighbours can be made, against what the charge assumes; whether real releases are, bit for bit, what the
               audited law makes of the same random bytes; a lower bound on epsilon from thousands of releases of two neighbours
  extraction   how often the best possible attacker names which of several candidates was released, beside what the guarantee allows

An audit is no proof: it shows failures, or that these attempts failed. An empirical epsilon is a lower bound; one far below the claim says
that the audit was weak. Everything is charged to a ledger in memory that only the audit has: no budget of yours is spent.
"""
EXAMPLES = """\
examples:
  a pipeline as you would protect it:
    hf-dp-xattn audit ./my-pipeline --mechanism anchors --epsilon 8 --calibration ./my-calibration
  one that is saved with its protection; more releases show more (a million take about a minute):
    hf-dp-xattn audit ./my-protected-pipeline --draws 1000000
  with candidates like the texts that you would hide, one a line; they are read, and neither printed nor written:
    hf-dp-xattn audit ./my-llama --mechanism kernel_sum --epsilon 8 --unit context --candidates texts.txt
  for a program:
    hf-dp-xattn audit ./my-bart --mechanism kernel_sum --epsilon 8 --json

exit codes: 0 nothing failed; 1 something failed: a leak, or more than the claim was shown; 2 bad input (the message is on stderr).
A sound release fails by chance with probability at most 1 - CONFIDENCE (and 10^-6 for the extraction).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    from ..audit.settings import CONFIDENCE, DRAWS, TRIALS

    add_protection(parser)
    parser.add_argument(
        "--draws",
        type=int,
        default=DRAWS,
        metavar="N",
        help=f"releases of each of two neighbours for the lower bound on epsilon (default: {DRAWS})",
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=TRIALS,
        metavar="N",
        help=f"releases for the extraction (default: {TRIALS})",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        metavar="C",
        help="of all lower bounds on epsilon together (default: 1 - 10^-6)",
    )
    parser.add_argument(
        "--candidates", metavar="FILE", help="texts for the extraction in place of random words, one a line"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the audit; 1 where something failed."""
    from ..audit.settings import check_numbers

    check_numbers(args.draws, args.trials, args.confidence)
    texts = None if args.candidates is None else read_texts(args.candidates, "--candidates")
    say(args, "loading the model")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # each of the many protections would repeat them; `protect` says them when it is meant
        from ..audit import audit

        trial = load_trial(args)
        report = audit(
            trial.host,
            trial.config,
            calibration=trial.calibration,
            tokenizer=trial.tokenizer,
            texts=texts,
            draws=args.draws,
            trials=args.trials,
            confidence=args.confidence,
            progress=not args.json,
        )
    print(report.to_json() if args.json else report)
    return 0 if report.passed else FAILED
