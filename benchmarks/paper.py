"""Measures every claim of the paper: `python benchmarks/paper.py` writes docs/paper.md, docs/paper/results.json and the figures."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from paper_parts import adaptive, costs, errors, growing, plots, shapes
from paper_parts.common import QUICK, Sizes
from paper_parts.page import page

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, Callable[[Sizes], dict[str, Any]]] = {
    "space": costs.space,
    "relative": lambda sizes: errors.relative(),
    "queries": costs.queries,
    "initialisation": costs.initialisation,
    "error_rows": errors.against_rows,
    "error_epsilon": errors.against_epsilon,
    "error_features": errors.against_features,
    "error_bins": errors.against_bins,
    "adversary": adaptive.adversary,
    "growing": growing.growth,
    "shapes": shapes.shapes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs/paper",
        help="folder of results and figures; the page lies beside it",
    )
    parser.add_argument(
        "--only",
        choices=tuple(PARTS),
        action="append",
        help="default: all parts; the others keep their results",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a test run: tiny sizes, numbers that mean nothing"
    )
    parser.add_argument(
        "--write-only", action="store_true", help="figures and page from the results that are there"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    sizes = QUICK if args.quick else Sizes()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in [] if args.write_only else args.only or PARTS:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = PARTS[name](sizes)
        results["meta"] = {"torch": torch.__version__, "machine": platform.machine()}
        path.write_text(json.dumps(results, indent=1) + "\n")
    plots.draw(results, args.out)
    missing = [name for name in PARTS if name not in results]
    if missing:
        print(f"No page yet: {', '.join(missing)} not measured.")
        return
    document = args.out.parent / f"{args.out.name}.md"
    document.write_text(page(results))
    print(f"{document} and {args.out}/*.png")


if __name__ == "__main__":
    main()
