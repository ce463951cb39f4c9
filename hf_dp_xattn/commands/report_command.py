"""`hf-dp-xattn report`: what something that was saved promises. Needs no model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from .read_artefact import read_artefact

NAME = "report"
HELP = "what a saved release, model, config or calibration promises"
ABBREVIATES = True  # nothing private could be taken for an option
NOT_PRIVATE = 1
DESCRIPTION = """\
Says what a saved release, protected model, config or calibration promises: (epsilon, delta), unit, neighbouring relation, what is public,
and what is NOT covered. What was charged before stays with the ledger of whoever made it. Reads and checks the files only; no model is
loaded, nothing is spent.
"""
EXAMPLES = """\
examples:
    hf-dp-xattn report ./release
    hf-dp-xattn report ./my-protected-pipeline
    hf-dp-xattn report me/my-calibration --revision v1 --json

exit codes: 0 something is promised (or, of a calibration, nothing needs to be); 1 NOT PRIVATE; 2 nothing readable there (the message is
on stderr).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument("artefact", help="folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--subfolder", help="of the folder or repository")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where nothing is promised."""
    kind, artefact = read_artefact(args.artefact, revision=args.revision, subfolder=args.subfolder)
    private, values, text = _report(kind, artefact, args.artefact)
    print(json.dumps({"kind": kind, "is_private": private, **values}, sort_keys=True) if args.json else text)
    return 0 if private else NOT_PRIVATE


def _report(kind: str, artefact: Any, name: str) -> tuple[bool, dict[str, Any], str]:
    """Whether something is promised, for programs, for people."""
    if kind == "release":
        report = artefact.report()
        return True, {"report": report.to_dict()}, str(report)
    text = artefact.card({"repo_id": name}).text.strip()
    if kind == "calibration":
        return True, {}, text
    if kind == "config":
        return artefact.is_private, {"config": artefact.to_dict()}, text
    values = {
        "public": artefact.public,
        "not_covered": artefact.not_covered,
        "budget": asdict(artefact.budget),
    }
    return artefact.config.is_private, {"config": artefact.config.to_dict(), **values}, text
