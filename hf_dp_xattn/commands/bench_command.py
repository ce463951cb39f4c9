"""`hf-dp-xattn bench`: what a protection costs in time on this machine, protected and unprotected in turn in one run."""

from __future__ import annotations

import argparse
import functools
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
STEP, FIRST, ANSWER, LATER = "step", "first token", "answer", "token after the first"
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
        what, tokens, runs = _pairs_of(subject, args)
        times, size = _measure(subject, runs, args)
    values = {
        "what": what,
        "config": trial.config.to_dict(),
        **_machine(trial.host),
        **_summary(times, tokens, size),
    }
    print(json.dumps(values, sort_keys=True) if args.json else _text(values))
    return 0


def _pairs_of(subject: Any, args: argparse.Namespace) -> tuple[str, int, Callable[[Any, Any], Runs]]:
    """What is timed, in words; tokens of an answer (1: no answers); and, for a canary and its release (None: unprotected), named runs."""
    if subject.draws and not subject.layered:
        raise ConfigError(
            "A pipeline that reads released text runs as it does on any prompt, so that no step differs; a release takes the encoding of "
            "its phrases. Measure a model of text, or another --mechanism."
        )
    if subject.draws:
        if args.new_tokens is not None:
            raise ConfigError("--new-tokens is for language models, and this is a pipeline of pictures.")
        edge = _edge(subject, args.latents)
        what = f"a denoising step with guidance (batch 2), latents {edge} x {edge}"
        return what, 1, functools.partial(_steps, subject, edge)
    if args.latents is not None:
        raise ConfigError("--latents is for pipelines of pictures, and this model writes text.")
    tokens = 16 if args.new_tokens is None else args.new_tokens
    if not 2 <= tokens <= 10_000:
        raise ConfigError(f"--new-tokens must be 2 to 10,000, got {tokens}.")
    what = f"an answer of {tokens} tokens ({subject.kind} model, greedy, batch 1)"
    return what, tokens, functools.partial(_answers, subject, tokens)


def _edge(subject: Any, latents: int | None) -> int:
    edge = subject.unet.config.sample_size if latents is None else latents
    least = 2 ** (len(subject.unet.config.block_out_channels) - 1)
    if not isinstance(edge, int) or edge < least or edge % least:
        raise ConfigError(f"--latents must be a multiple of {least} for this model.")
    return edge


def _steps(subject: Any, edge: int, canary: Any, release: Any) -> Runs:
    import torch

    negative, prompt = subject.states(canary)
    if release is not None:
        prompt = next(iter(subject.inputs(release).values()))
    states = torch.cat([negative, prompt])
    sample, step = subject.step_inputs(batch=2, edge=edge)

    def one() -> Any:
        with torch.no_grad():
            return subject.unet(sample, step, encoder_hidden_states=states).sample

    return {STEP: one}


def _answers(subject: Any, tokens: int, canary: Any, release: Any) -> Runs:
    def answer(count: int) -> Any:
        subject.new_tokens = count
        inputs = subject.unprotected(canary) if release is None else subject.inputs(release)
        return subject.answer(inputs)[1]

    return {FIRST: lambda: answer(1), ANSWER: lambda: answer(tokens)}


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
