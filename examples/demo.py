"""A first look, in minutes: `make demo`.

1. A language model that people use (SmolLM2-135M-Instruct) with a private system prompt that holds rules and a secret code: what is
   released of it, what the model answers without protection and with it, and what an attacker gets.
2. A picture model (`shapes`, which we trained and ship): one private prompt at several epsilons, phrase by phrase and as a whole; and what
   protecting one embedding row looks like, which protects no prompt.

Everything that is printed was generated in this run, with fresh noise.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from assistant.smollm import ABSENT, load_chat, weights
from assistant.story import LIBRARY, page, tell


def assistant(args: argparse.Namespace) -> dict[str, Any] | None:
    """Prints the first part and writes its report; None where there is no language model on this machine."""
    if args.model is None and weights() is None:
        print(f"The first part is left out. {ABSENT}\n", file=sys.stderr)
        return None
    story = tell(load_chat(args.model), args.epsilon, calibration=args.library, quiet=args.json)
    (args.out / "report.txt").write_text(f"{story.report}\n")
    (args.out / "report.json").write_text(story.report.to_json() + "\n")
    (args.out / "plan.txt").write_text(f"{story.plan}\n")
    if not args.json:
        print("\n" + page(story, args.epsilon), flush=True)
        print(f"{story.report}\n", flush=True)
    return story.to_dict()


def pictures(args: argparse.Namespace) -> list[str]:
    """Draws the second part's strip; returns what its rows are."""
    from shapes.evaluate import load_pipeline
    from shapes.strip import ROWS, strip

    if not args.json:
        print("Drawing one private prompt at several epsilons ...", flush=True)
    strip(load_pipeline(), args.out / "strip.png", quiet=args.json)
    return [row.told for row in ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--epsilon", type=float, default=8.0, help="of the system prompt's release")
    parser.add_argument("--model", help="Hub id or folder of another chat model (then also --library)")
    parser.add_argument(
        "--library", type=Path, default=LIBRARY, help="its library (assistant/make_library.py makes one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    summary: dict[str, Any] = {"assistant": assistant(args), "pictures": pictures(args)}
    summary |= {"out": str(args.out), "seconds": time.perf_counter() - start}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if args.json:
        print(json.dumps(summary))
        return
    print(f"\nDone in {summary['seconds']:.0f} s. Files in {args.out.resolve()}:")
    for row in (
        "strip.png",
        *(f"  row: {told}" for told in summary["pictures"]),
        "report.txt",
        "report.json",
        "plan.txt",
    ):
        print(f"  {row}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=UserWarning)
    main()
