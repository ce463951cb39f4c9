"""Time to first token and per generated token behind a private context of n = 1,024 ... 262,144 rows, protected and unprotected.

Both kinds of host of transformers, random weights, one run; for each n the sides take turns, so that all see the same machine.
Correctness first: with `mechanism="none"` both sides must answer alike from the same n rows. What is compared:

* The private rows are there on both sides before the clock starts: in an encoder-decoder model the encoder has run, in a decoder-only model
  keys and values of the prefix have been computed. An unprotected encoder-decoder model makes keys and values of n rows at its first token.
* Unprotected attention is torch's SDPA over a cache that is never copied. transformers' default cache, which copies all rows at each token,
  stands beside it.
* `anchors` with a calibration that was not fitted (times do not depend on what it decodes), and `kernel_sum` for the smaller n.

Targets: a protected token is faster from n = 4,096 on, at least 20 times at n = 262,144, and as fast there as at n = 1,024.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from token_parts.clock import Timed, answer
from token_parts.hosts import DecoderOnly, EncoderDecoder, Host, Inputs, Sizes
from token_parts.page import markdown
from tqdm.auto import tqdm

__all__ = ["FULL", "Plan", "markdown", "measure"]

ANCHORS, KERNEL, EXACT, DEFAULT = "anchors", "kernel_sum", "exact", "default cache"
PROTECTED = (ANCHORS, KERNEL)
PARTS = ("first", "token", "layers")


@dataclass(frozen=True)
class Plan:
    """hosts: what to measure at which n. kernel_sum is released up to `kernel_rows` rows. tokens: of an answer, after the first."""

    hosts: tuple[tuple[type[Host], Sizes, tuple[int, ...]], ...]
    kernel_rows: int
    tokens: int = 12
    long_tokens: int = 4
    long_rows: int = 65_536
    repeats: int = 7
    long_repeats: int = 3

    def effort(self, n: int) -> tuple[int, int]:
        """(repeats, tokens): fewer of both where a token takes long."""
        long = n >= self.long_rows
        return (self.long_repeats, self.long_tokens) if long else (self.repeats, self.tokens)


ROWS = (1024, 2048, 4096, 8192, 16_384, 65_536, 262_144)
FULL = Plan(
    (
        (DecoderOnly, Sizes(), ROWS),
        (DecoderOnly, Sizes(key_heads=2), (1024, 4096, 262_144)),
        (EncoderDecoder, Sizes(), ROWS),
    ),
    kernel_rows=4096,
)


@torch.no_grad()
def measure(plan: Plan = FULL, progress: bool = True) -> dict[str, Any]:
    """Seconds by host and n; see `markdown` for what is read off them."""
    found = []
    total = sum(len(rows) for *_, rows in plan.hosts)
    steps = tqdm(total=total, desc="tokens", disable=not progress, leave=False)
    for kind, sizes, rows in plan.hosts:
        host = kind(sizes)
        error = check(host)
        handles = {name: host.protect(name) for name in PROTECTED}
        points = []
        for n in rows:
            steps.set_postfix_str(f"{host.name}, n = {n:,}")
            points.append(measure_at(host, handles, n, plan))
            gc.collect()
            steps.update()
        found.append({**host.describe(), "relative_error_checked": error, "points": points})
    steps.close()
    return {"threads": torch.get_num_threads(), "hosts": found}


def check(host: Host, n: int = 64) -> float:
    """Largest relative difference of the scores of both sides' answers, with exact rows; raises where they are not alike."""
    count = 3
    options = {
        "max_new_tokens": count,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    plain = host.plain.generate(**host.exact_inputs(n, count)[0](), **options)
    handle = host.protect("none")
    own = handle.model.generate(**host.protected_inputs(host.release(handle, host.rows(n)))(), **options)
    want, got = (torch.stack(tuple(o.scores)) for o in (plain, own))
    error = float((got - want).abs().max() / want.abs().max())
    if not error < 1e-4 or not torch.equal(plain.sequences, own.sequences):
        raise SystemExit(
            f"{host.name}: protected answers are wrong (relative error {error:.3g}): no times are printed."
        )
    return error


def measure_at(host: Host, handles: dict[str, Any], n: int, plan: Plan) -> dict[str, Any]:
    """One n: the releases, then answers in turn."""
    repeats, count = plan.effort(n)
    sides: dict[str, tuple[Any, Inputs]] = {}
    release_s, served = {}, 0
    for name in PROTECTED if n <= plan.kernel_rows else (ANCHORS,):
        rows = host.rows(n)
        start = time.perf_counter()
        release = host.release(handles[name], rows)
        release_s[name] = time.perf_counter() - start
        sides[name] = handles[name].model, host.protected_inputs(release)
        if name == ANCHORS:
            context = release.contexts[0].context
            assert context is not None
            served = len(context.rows)
        del rows, release
    exact, by_default = host.exact_inputs(n, count)
    sides[EXACT] = host.plain, exact
    times: dict[str, list[Timed]] = {name: [] for name in sides}
    rehearsals = int(n < plan.long_rows)  # where they are cheap
    for i in range(rehearsals + repeats):
        for name, (model, inputs) in sides.items():
            timed = answer(model, inputs, host.watched(model), count)
            if i >= rehearsals:
                times[name].append(timed)
    if by_default is not None:
        times[DEFAULT] = [answer(host.plain, by_default(), host.watched(host.plain), count)]
    return {
        "n": n,
        "rows_served": served,
        "release_s": release_s,
        "sides": {
            name: {part: median(getattr(t, part) for t in own) for part in PARTS}
            for name, own in times.items()
        },
        "speedup": {
            name: {part: _spread(times[EXACT], own, part) for part in PARTS}
            for name, own in times.items()
            if name in PROTECTED
        },
    }


def _spread(exact: Sequence[Timed], own: Sequence[Timed], part: str) -> dict[str, float]:
    """How many times longer exact attention takes: the median of pairs that took turns, the least and the largest."""
    ratios = [getattr(e, part) / getattr(o, part) for e, o in zip(exact, own, strict=True)]
    return {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
