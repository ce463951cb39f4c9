"""Utility of private contexts on the shapes pipeline: `python benchmarks/utility.py --out docs/utility` (about 40 minutes on one core).

Four parts: a. FVU of every cross-attention output against epsilon; b. attributes right in the pictures; c. FVU against the number of rows;
d. larger units (a phrase, a whole prompt). Writes results.json after every step, plots, and a page of all results beside the folder.
Everything fitted or chosen is so on public captions; private are the held-out ones, disjoint in every (colour, shape, place).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from shapes.private import CALIBRATIONS, DELTA
from shapes_utility.lengths import measure_lengths
from shapes_utility.page import write_page
from shapes_utility.parts import measure_attributes, measure_fvu, measure_units
from shapes_utility.plots import draw_plots
from shapes_utility.setting import QUICK, Setting, Sizes

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"a": measure_fvu, "b": measure_attributes, "c": measure_lengths, "d": measure_units}


class Store:
    """results.json: one entry per part, replaced as the part goes on; a file is either the old one or the new one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def put(self, part: str, found: dict[str, Any], sizes: Sizes, seconds: float) -> None:
        self.results[part] = {
            **found,
            "sizes": asdict(sizes),
            "delta": DELTA,
            "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        new = self._path.with_suffix(".tmp")
        new.write_text(json.dumps(self.results, indent=1) + "\n")
        new.replace(self._path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/utility", help="folder of results and plots")
    parser.add_argument("--only", choices=tuple(PARTS), action="append", help="default: all parts")
    parser.add_argument(
        "--quick", action="store_true", help="a test run: tiny sizes, numbers that mean nothing"
    )
    parser.add_argument(
        "--write-only", action="store_true", help="plots and page from the results that are there"
    )
    parser.add_argument(
        "--calibrations", type=Path, default=CALIBRATIONS, help="folder with row, group, context"
    )
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    args.out.mkdir(parents=True, exist_ok=True)
    store = Store(args.out / "results.json")
    if not args.write_only:
        setting = Setting(QUICK if args.quick else Sizes(), args.calibrations)
        for part in args.only or PARTS:
            start = time.perf_counter()
            for found in PARTS[part](setting):
                store.put(part, found, setting.sizes, time.perf_counter() - start)
    draw_plots(store.results, args.out)
    page = write_page(store.results, args.out)
    print(f"{page} and {args.out}/*.png")


if __name__ == "__main__":
    main()
