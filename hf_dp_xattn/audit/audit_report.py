"""`AuditReport`: what was tried, and what came of it. Holds nothing of a context, not even of a canary."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"

LIMITS = (
    "An audit is no proof. Passing says that these attempts failed, on these canaries, on this machine, with these versions; it bounds "
    "nothing else. The guarantee rests on its proof.",
    "An empirical epsilon is a LOWER bound on what leaves; the claim is an upper bound. A bound far below the claim says that the audit "
    "was weak, not that the release is better than claimed.",
    "What is not looked at: timing, memory, swap and core dumps, logs of your own program, the calibration's data, other processes, and "
    "whether the operating system's entropy is sound.",
)


@dataclass(frozen=True)
class Check:
    """name: what was tried. verdict: "pass", "fail", or "not applicable" with the reason in `text`, which says what was done."""

    name: str
    verdict: str
    text: str

    @property
    def failed(self) -> bool:
        return self.verdict == FAIL


@dataclass(frozen=True)
class EpsilonBound:
    """A lower bound on epsilon at delta.

    claimed: what the events are charged. low: exceeded but with probability 1 - confidence over ALL bounds of a report; low_95: this
    bound by itself, at 95 %. ceiling: the largest `low` that so many draws can give. draws: releases of each neighbour. family: "gaussian"
    where the noise is known to be, "any" where nothing is assumed. gap: distance of the neighbours as a share of the sensitivity.
    """

    claimed: float
    delta: float
    low: float
    low_95: float
    ceiling: float
    draws: int
    confidence: float
    family: str
    gap: float


@dataclass(frozen=True)
class Extraction:
    """The best possible guess of which of k public candidates was released.

    rate, low, high: share of right guesses with its 95 % interval. bound: what the guarantee allows (`privacy/guessing.py`), for
    candidates that differ in `units` units. chance: 1 / k.
    """

    candidates: int
    units: int
    trials: int
    rate: float
    low: float
    high: float
    bound: float
    chance: float


@dataclass(frozen=True)
class AuditReport:
    """What `audit` found. str(), to_dict(), to_json(); `passed` is False where a check failed."""

    host: str
    config: dict[str, Any]
    checks: tuple[Check, ...]
    bounds: tuple[EpsilonBound, ...] = ()
    extraction: Extraction | None = None
    notes: tuple[str, ...] = ()
    limits: tuple[str, ...] = LIMITS

    @property
    def passed(self) -> bool:
        """Whether nothing failed; what is not applicable did not fail."""
        return not any(c.failed for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        values = _plain(asdict(self))
        values["passed"] = self.passed
        result: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False))
        return result

    def to_json(self, **kwargs: Any) -> str:
        return json.dumps(self.to_dict(), **{"indent": 2, "sort_keys": True, **kwargs})

    def __str__(self) -> str:
        c = self.config
        lines = [
            f"Audit of {self.host}: mechanism {c['mechanism']}, epsilon {c['epsilon']:g}, delta {c['delta']:g}, unit {c['unit']}, "
            f"{c['neighboring']}"
        ]
        width = max(len(check.name) for check in self.checks)
        lines += [f"  {k.verdict.upper():<14}  {k.name:<{width}}  {k.text}" for k in self.checks]
        if self.bounds:
            lines += ["", "Lower bounds on epsilon from releases of two neighbours", *self._bounds()]
        if self.extraction is not None:
            lines += ["", *self._extraction(self.extraction)]
        counts = [sum(k.verdict == v for k in self.checks) for v in (PASS, FAIL, NOT_APPLICABLE)]
        lines += ["", f"{counts[0]} passed, {counts[1]} failed, {counts[2]} not applicable"]
        return "\n".join([*lines, *(f"  - {n}" for n in (*self.notes, *self.limits))])

    def _bounds(self) -> list[str]:
        header = ["claimed", "delta", "shown", "at 95 %", "largest", "releases", "noise"]
        rows = [
            [
                f"{b.claimed:.4g}",
                f"{b.delta:g}",
                f"{b.low:.3g}",
                f"{b.low_95:.3g}",
                f"{b.ceiling:.3g}",
                f"2 x {b.draws:,}",
                b.family,
            ]
            for b in self.bounds
        ]
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        return ["  " + "  ".join(x.rjust(w) for x, w in zip(r, widths, strict=True)) for r in [header, *rows]]

    @staticmethod
    def _extraction(e: Extraction) -> list[str]:
        return [
            f"Extraction: which of {e.candidates} candidates (differing in {e.units} unit(s)) was released, guessed at best from the "
            "release",
            f"  right in {100 * e.rate:.1f} % of {e.trials:,} releases (95 %: {100 * e.low:.1f} to {100 * e.high:.1f}); by chance "
            f"{100 * e.chance:.1f} %; the guarantee allows {100 * e.bound:.1f} %",
        ]


def _plain(value: Any) -> Any:
    """JSON has no infinity: None stands for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
