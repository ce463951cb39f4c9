"""Runs the benchmarks and writes their tables: `python benchmarks/run.py --out docs/benchmarks` (ratios from one run).

Targets. `anchors` at Stable Diffusion 1.5's shapes: calibration of 4,096 anchors from 10,000 prompts <= 10 minutes, release of a prompt
<= 50 ms, a protected denoising step <= 1.00 of an unprotected one. `kernel_sum` there: release <= 5 s, step <= 1.25; `attend` faster than
exact attention from n = 2,048 on (degree 2, head dim 64), and flat in n. `steps_...`, at the shapes of SDXL, PixArt and Flux: the same
targets for a step, and a release where no encoder runs <= 50 ms. `tokens`, language models behind n private rows: faster than
exact attention from n = 4,096 on, at least 20 times at n = 262,144, flat in n.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import anchors
import attend
import noise
import sd15
import steps
import tokens

SECTIONS = {
    "noise": noise.measure,
    "attend": attend.measure,
    "anchors": anchors.measure,
    "anchors_step": anchors.measure_step,
    "anchors_step_kept": anchors.measure_step_kept,
    "sd15": sd15.measure,
    **{f"steps_{name}": partial(steps.measure, name) for name in steps.HOSTS},
    "tokens": tokens.measure,
}


STEPS = {"anchors_step": "", "anchors_step_kept": ", an allocator that keeps freed memory"}


def markdown(results: dict[str, dict]) -> str:
    threads = next((r["threads"] for r in results.values() if "threads" in r), torch.get_num_threads())
    lines = [f"Measured with {threads} threads, torch {torch.__version__}.", ""]
    if "noise" in results:
        lines += ["| discrete noise, 10^6 samples | seconds |", "|---|---|"]
        lines += [f"| {k} | {v:.2f} |" for k, v in results["noise"].items()]
    if "attend" in results:
        r = results["attend"]
        lines += [
            "",
            f"`attend`, degree {r['degree']}, {r['heads']} heads of {r['head_dim']}, {r['queries']} queries; the structure has "
            f"{r['structure_bytes'] / 1e6:.1f} MB at every n.",
            "",
            "The ratio is the median over pairs that take turns, with its 95 % interval.",
            "",
            "| rows n | attend, ms | exact (SDPA), ms | exact / attend | pairs | release, s |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {x['n']:,} | {1e3 * x['attend_s']:.1f} | {1e3 * x['sdpa_s']:.1f} | {x['speedup']:.2f} ({x['low']:.2f} to "
            f"{x['high']:.2f}) | {x['pairs']} | {x['release_s']:.2f} |"
            for x in r["rows"]
        ]
    if "anchors" in results:
        r = results["anchors"]
        lines += [
            "",
            "`anchors` on Stable Diffusion 1.5's UNet (random weights), 16 cross-attention layers, n = 77, 64 x 64 latents, batch 2.",
            "",
            "| what | value | target |",
            "|---|---|---|",
            f"| calibration: {r['anchors']:,} anchors, {r['contexts']:,} public prompts, decoder | {r['calibration_s']:.0f} s | 600 s |",
            f"| release of one prompt's rows, decoded | {1e3 * r['release_s']:.0f} ms | 50 ms |",
            f"| keys and values of the decoded rows, once per picture | {1e3 * r['activation_s']:.0f} ms | |",
            f"| rows served | {r['rows_served']} of 77 | |",
        ]
    for name, words in STEPS.items():
        if name not in results:
            continue
        r = results[name]
        low, high = r["step_ratio_interval"]
        lines += [
            f"| denoising step{words}, protected / unprotected, median of {r['repeats']} pairs | {r['step_ratio']:.3f} "
            f"({r['step_protected_s']:.2f} s / {r['step_unprotected_s']:.2f} s; 95 % interval of the median {low:.3f} to "
            f"{high:.3f}) | 1.00 |",
            f"| the same from its cross-attention layers and the gate alone, all that differs "
            f"({1e3 * r['layers_protected_s']:.0f} ms + {1e3 * r['gate_s']:.1f} ms / {1e3 * r['layers_unprotected_s']:.0f} ms) | "
            f"{r['step_ratio_from_layers']:.4f} | 1.00 |",
        ]
    if "sd15" in results:
        r = results["sd15"]
        lines += [
            "",
            f"`kernel_sum` on Stable Diffusion 1.5's UNet (random weights), {r['layers']} cross-attention layers, n = {r['rows']}, "
            f"{r['latents']} x {r['latents']} latents, batch 2 (guidance), no calibration.",
            "",
            "| what | value | target |",
            "|---|---|---|",
            f"| release of one context | {r['release_s']:.2f} s | 5 s |",
            f"| structure of one context | {r['structure_bytes'] / 1e6:.1f} MB | |",
            f"| `protect` (once) | {r['protect_s']:.2f} s | |",
            f"| denoising step, protected / unprotected | {r['step_ratio']:.3f} "
            f"({r['step_protected_s']:.2f} s / {r['step_unprotected_s']:.2f} s) | 1.25 |",
        ]
    timed = [row for name in steps.HOSTS for row in results.get(f"steps_{name}", {}).get("rows", ())]
    if timed:
        lines += steps.markdown(timed)
    if "tokens" in results:
        lines += ["", tokens.markdown(results["tokens"])]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--only", choices=SECTIONS, action="append")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = args.only or list(SECTIONS)
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if args.only and path.exists() else {}
    for name in wanted:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = SECTIONS[name]()
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "results.md").write_text(markdown(results))
    print(json.dumps(results) if args.json else markdown(results))


if __name__ == "__main__":
    main()
