"""`hf-dp-xattn plan`: what a release would give, before any budget is spent."""

from __future__ import annotations

import argparse
import sys

from .models import add_units

NAME = "plan"
HELP = "predict quality, odds and cost of a release; spends nothing"
ABBREVIATES = True  # nothing private could be taken for an option
DESCRIPTION = """\
Tells, from public calibrations only and before any budget is spent, what a release would give at each epsilon: predicted quality with its
95 % interval, what would leave, an attacker's best odds, memory and time. Nothing is released or charged.
"""
EXAMPLES = """\
examples:
  all epsilons that the calibration was made for:
    hf-dp-xattn plan ./my-calibration
  one epsilon, or several:
    hf-dp-xattn plan ./my-calibration --epsilon 8
    hf-dp-xattn plan ./my-calibration --epsilons 1 2 4 8
  the smallest epsilon for a wanted quality (exit code 1 where it is not reached):
    hf-dp-xattn plan ./my-calibration --want-fvu 0.5
    hf-dp-xattn plan ./my-calibration --want-score 0.9 --plot plan.png
  several calibrations, of which the one that fits is used; for a program:
    hf-dp-xattn plan ./by-row ./by-phrase --unit group --json

exit codes: 0 done; 1 a wanted quality is not reached at any calibrated epsilon; 2 bad input (the message is on stderr).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument(
        "calibration", nargs="+", help="folder or Hub id of a calibration: a library, or of anchors"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--epsilon", type=float, metavar="E", help="privacy loss of one release")
    which.add_argument(
        "--epsilons",
        type=float,
        nargs="+",
        metavar="E",
        help="several of them (default: all that were calibrated)",
    )
    add_units(
        parser,
        delta=" of the guarantee (default: the calibration's)",
        unit="",
        neighboring=": replaced (their number is public), or added or removed",
    )
    parser.add_argument(
        "-n", "--rows", type=int, metavar="N", help="units in one context: rows, or groups for --unit group"
    )
    parser.add_argument(
        "--want-fvu", type=float, metavar="X", help="find the smallest epsilon whose FVU is at most X"
    )
    parser.add_argument(
        "--want-score", type=float, metavar="X", help="find the smallest epsilon whose score is at least X"
    )
    parser.add_argument(
        "--score", metavar="NAME", help="which of the publisher's scores (default: the first)"
    )
    parser.add_argument("--dtype", help="type of keys and values in memory, such as float16")
    parser.add_argument("--no-measure", action="store_true", help="do not time releases on this machine")
    parser.add_argument("--plot", metavar="FILE", help="also draw it: plan.png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 1 where a wanted quality is not reached."""
    from ..calibration.planner import plan

    report = plan(
        args.calibration,
        epsilon=args.epsilon,
        epsilons=args.epsilons,
        unit=args.unit,
        neighboring=args.neighboring,
        n=args.rows,
        delta=args.delta,
        want_fvu=args.want_fvu,
        want_score=args.want_score,
        score=args.score,
        dtype=args.dtype,
        measure=not args.no_measure,
    )
    print(report.to_json() if args.json else report)
    if args.plot is not None:
        print(f"wrote {report.plot(args.plot)}", file=sys.stderr)
    return 0 if report.reached else 1
