"""`hf-dp-xattn bench`: what a protection costs in time on this machine, protected and unprotected in turn in one run."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .models import add_protection
from .release_command import say
from .trial_hosts import load_trial

NAME = "bench"
HELP = "what a protection costs in time on this machine"
DESCRIPTION = """\
Measures what a protection costs on this machine, on your own model, with canaries (random words) in place of private text:

  pipelines         one denoising step with guidance (batch 2)
  language models   the time to the first token of an answer, and per token after it
  both              the time of protect and of a release, and the size of a release in a file

Protected and unprotected runs alternate in one process, so that what else the machine does meets both; each pair gives a ratio, and the
median and the range of the ratios are printed. Times of different runs or machines are not to be compared. Nothing private is read, and
canaries are charged to a ledger in memory.
"""
EXAMPLES = """\
examples:
  a pipeline, at the size of its latents or a smaller one:
    hf-dp-xattn bench ./my-pipeline --mechanism anchors --epsilon 8 --calibration ./my-calibration
    hf-dp-xattn bench ./my-pipeline --mechanism kernel_sum --epsilon 8 --latents 32 --repeats 5
  a language model, with answers of 64 tokens; for a program:
    hf-dp-xattn bench ./my-llama --mechanism kernel_sum --epsilon 8 --new-tokens 64 --json

exit codes: 0 measured, whatever the times are; 2 bad input (the message is on stderr).
"""
PLAIN, PROTECTED = "unprotected", "protected"
LATER = "token after the first"
Times = dict[str, list[float]]
Runs = dict[str, Callable[[], Any]]


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them but `--json`."""
    add_protection(parser)
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="pairs of runs (default: 7)")
    parser.add_argument(
        "--latents", type=int, metavar="N", help="pipelines: edge of the latents (default: the model's own)"
    )
    parser.add_argument(
        "--new-tokens", type=int, metavar="N", help="language models: tokens of an answer (default: 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the times."""
    if not 1 <= args.repeats <= 10_000:
        raise ConfigError(f"--repeats must be 1 to 10,000, got {args.repeats}.")
    say(args, "loading the model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ..audit.subjects import subject_of

        trial = load_trial(args)
        subject = subject_of(trial.host, trial.config, trial.calibration, trial.tokenizer)
        timed = subject.timed(args.latents, args.new_tokens)
        times, size = _measure(subject, timed.runs, args)
    values = {
        "what": timed.what,
        "config": trial.config.to_dict(),
        **_machine(trial.host),
        **_summary(times, timed.tokens, size),
    }
    print(json.dumps(values, sort_keys=True) if args.json else _text(values))
    return 0


def _measure(subject: Any, runs: Callable[[Any, Any], Runs], args: argparse.Namespace) -> tuple[Times, int]:
    """Seconds of each run, protected and unprotected in turn, and a release's bytes."""
    from tqdm.auto import tqdm

    canaries = subject.canaries(args.repeats)
    times: Times = {"protect": [], "release": []}
    size = 0
    for i, canary in enumerate(tqdm(canaries, disable=args.json, desc="pairs")):
        for side in (PLAIN, PROTECTED) if i % 2 else (PROTECTED, PLAIN):
            if side == PLAIN:
                _time(times, side, runs(canary, None))
                continue
            start = time.perf_counter()
            with subject.protected() as handle:
                times["protect"].append(time.perf_counter() - start)
                start = time.perf_counter()
                release = subject.release(canary)
                times["release"].append(time.perf_counter() - start)
                size = size or _bytes_of(release)
                with handle.public():
                    named = runs(canary, release)
                _time(times, side, named)
    return times, size


def _time(times: Times, side: str, named: Runs) -> None:
    """One timing of each run, after one that is not timed (it pays for what is set up once)."""
    for name, one in named.items():
        one()
        start = time.perf_counter()
        output = one()
        times.setdefault(f"{name}, {side}", []).append(time.perf_counter() - start)
        if side == PROTECTED and bool(output.isnan().any()):
            raise ConfigError(
                "The protected model gives NaN: no times are printed. Run hf-dp-xattn audit on it."
            )


def _bytes_of(release: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        release.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).iterdir() if f.suffix in (".json", ".safetensors"))


def _machine(host: Any) -> dict[str, Any]:
    import torch

    return {
        "host": type(host).__name__,
        "device": str(host.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": ordered[len(ordered) // 2], "low": ordered[0], "high": ordered[-1]}


def _summary(times: Times, tokens: int, size: int) -> dict[str, Any]:
    from ..hosts.driver import ANSWER, FIRST, STEP

    for side in (PLAIN, PROTECTED):
        whole = times.pop(f"{ANSWER}, {side}", [])
        if whole:
            firsts = times[f"{FIRST}, {side}"]
            later = [(w - f) / (tokens - 1) for w, f in zip(whole, firsts, strict=True)]
            times[f"{LATER}, {side}"] = [max(1e-9, t) for t in later]
    ratios = {}
    for name in (STEP, FIRST, LATER):
        if f"{name}, {PLAIN}" in times:
            pairs = zip(times[f"{name}, {PROTECTED}"], times[f"{name}, {PLAIN}"], strict=True)
            ratios[name] = _spread([p / q for p, q in pairs])
    return {
        "seconds": {name: _spread(values) for name, values in times.items()},
        "ratios": ratios,
        "repeats": len(times["protect"]),
        "release_bytes": size,
    }


def _text(values: dict[str, Any]) -> str:
    c, seconds = values["config"], values["seconds"]
    lines = [
        f"{values['host']}, {c['mechanism']}, epsilon {c['epsilon']:g}, unit {c['unit']}: {values['what']}",
        f"  {values['device']}, {values['threads']} thread(s), torch {values['torch']}; {values['repeats']} pairs, median (range)",
    ]
    for name, ratio in values["ratios"].items():
        protected, plain = (seconds[f"{name}, {side}"] for side in (PROTECTED, PLAIN))
        lines.append(
            f"  {name}: protected / unprotected {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f}); "
            f"{_seconds(protected)} / {_seconds(plain)}"
        )
    lines += [f"  {name}, once: {_seconds(seconds[name])}" for name in ("protect", "release")]
    lines.append(f"  a release in a file: {values['release_bytes'] / 1024:,.1f} KiB")
    return "\n".join(lines)


def _seconds(spread: dict[str, float]) -> str:
    low, high = (f"{1e3 * spread[k]:.3g}" for k in ("low", "high"))
    return f"{1e3 * spread['median']:.3g} ms ({low} to {high})"
