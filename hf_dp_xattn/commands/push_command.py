"""`hf-dp-xattn push`: a saved release, config or calibration to the Hub, with its card."""

from __future__ import annotations

import argparse
import json
import sys

from ..errors import ConfigError
from .read_artefact import read_artefact

NAME = "push"
HELP = "upload a saved release, config or calibration to the Hub"
ABBREVIATES = True  # nothing private could be taken for an option
DESCRIPTION = """\
Reads and checks a saved release, config or calibration, and uploads it to a Hub repository in one commit, with a card that states the
guarantee. Only its own files go up, whatever else stands in the folder. Exact rows and seeded noise are never pushed.

A release is differentially private: what it tells at its epsilon, it tells to everyone who can read the repository, for ever.

The token is read from `hf auth login` or from HF_TOKEN, never from the argument list, which shells and process tables keep.
"""
EXAMPLES = """\
examples:
    hf-dp-xattn push ./my-calibration me/my-calibration --license apache-2.0 --base-model owner/model
    hf-dp-xattn push ./release me/my-release --private --json

exit codes: 0 done; 2 bad input, or the upload failed and the repository is as it was (the message is on stderr).
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    parser.add_argument("folder", help="folder that save_pretrained or `release` wrote")
    parser.add_argument("repo", help="Hub id, owner/name; made if needed")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--subfolder", help="of the repository")
    parser.add_argument("--license", help="license id of the Hub for the card, such as apache-2.0")
    parser.add_argument("--base-model", help="Hub id of the model that it is for, for the card")
    parser.add_argument("--message", help="commit message")


def run(args: argparse.Namespace) -> int:
    """Prints the commit's address."""
    kind, artefact = read_artefact(args.folder)
    if kind == "protection":
        raise ConfigError(
            "This is a whole protected model: pipe = dpx.from_pretrained(folder); pipe.push_to_hub(repo_id) uploads it with its protection."
        )
    if not args.json:
        print(f"uploading the {kind} to {args.repo} ...", file=sys.stderr, flush=True)
    address = artefact.push_to_hub(
        args.repo,
        private=True if args.private else None,
        revision=args.revision,
        create_pr=args.create_pr,
        subfolder=args.subfolder,
        license=args.license,
        base_model=args.base_model,
        commit_message=args.message,
    )
    print(json.dumps({"kind": kind, "repo": args.repo, "commit": address}) if args.json else address)
    return 0
