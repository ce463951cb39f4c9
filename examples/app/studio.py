"""What the page does, without the page: one pipeline, a ledger for each unit, every release made once and charged once.

The prompt is kept nowhere: releases are found again by a keyed digest (of the ledger, whose key is random and never leaves memory). What
stays of a prompt, in memory and until `reset`, is its picture without protection, the pictures drawn from its releases, and reports.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from shapes.evaluate import generate, load_pipeline
from shapes.private import DELTA, UNITS, config, load_calibration
from shapes.reader import load_reader, score
from shapes.scenes import Scene, parse_caption

import hf_dp_xattn as dpx

BUDGET = 128.0  # more than all values of the slider together
MOST_PROMPTS = 200  # whose pictures are kept; a prompt that was dropped is released, and charged, anew


@dataclass(frozen=True)
class Spent:
    """What one prompt has spent under one unit: epsilon at DELTA of all its releases together, by the ledger."""

    unit: str
    epsilon: float
    releases: int
    budget: float


@dataclass(frozen=True)
class Drawn:
    """One prompt, one unit, one epsilon.

    plain, protected: pictures [32, 32, 3] in 0..1, from the same noise. again: the release was there, so nothing was charged. right:
    attributes that a reader finds in the protected picture, and how many the prompt names; None where the prompt is no caption of shapes.
    report: with what the context has spent by now. strip: (epsilon, picture) of every release of this prompt and unit so far. others:
    other units under which this prompt was released.
    """

    unit: str
    epsilon: float
    plain: np.ndarray
    protected: np.ndarray
    again: bool
    right: tuple[int, int] | None
    report: dpx.PrivacyReport
    spent: Spent
    strip: tuple[tuple[float, np.ndarray], ...]
    others: tuple[Spent, ...]


@dataclass
class _Context:
    """One prompt under one unit. digest: the ledger's name of it. releases: epsilon -> picture and report."""

    digest: str
    releases: dict[float, tuple[np.ndarray, dpx.PrivacyReport]] = field(default_factory=dict)


@dataclass
class _Prompt:
    plain: np.ndarray
    scene: Scene | None
    contexts: dict[str, _Context] = field(default_factory=dict)


class Studio:
    """Draws private prompts. Calls of several threads wait for each other: a pipeline serves one at a time."""

    def __init__(self, budget: float = BUDGET) -> None:
        """budget: epsilon that one prompt may spend under one unit. Raises ConfigError where it is not positive and finite."""
        self.budgets = {unit: dpx.Budget(budget, DELTA, unit, "replace_one") for unit in UNITS}
        self._lock = threading.RLock()
        self._start_ledgers()

    def _start_ledgers(self) -> None:
        # charges under different units do not compose, and a ledger refuses to mix them on one context
        self._ledgers = {unit: dpx.Ledger() for unit in UNITS}
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()

    def reset(self) -> None:
        """Forgets what was spent. For this demo only: what was released stays released."""
        with self._lock:
            self._start_ledgers()

    @cached_property
    def pipeline(self):
        return load_pipeline()

    @cached_property
    def calibrations(self) -> dict[str, dpx.Calibration]:
        return {unit: load_calibration(unit) for unit in UNITS}

    @cached_property
    def epsilons(self) -> tuple[float, ...]:
        """Values that all units are calibrated for, in order."""
        each = [{p.epsilon for p in c.plans} for c in self.calibrations.values()]
        return tuple(sorted(set.intersection(*each)))

    @cached_property
    def _reader(self):
        return load_reader()

    @cached_property
    def _plans(self) -> dict[tuple[str, float], dpx.Plan]:
        return {
            (unit, epsilon): dpx.plan(calibration, epsilon=epsilon, delta=DELTA, measure=False)
            for unit, calibration in self.calibrations.items()
            for epsilon in self.epsilons
        }

    def plan(self, unit: str, epsilon: float) -> dpx.Plan:
        """What to expect. Reads the calibration, never a prompt; spends nothing."""
        with self._lock:
            return self._plans[unit, epsilon]

    def warm_up(self) -> None:
        """Loads everything, so that the first visitor does not wait."""
        with self._lock:
            generate(self.pipeline, [""])
            assert self._plans and self._reader

    def draw(self, prompt: str, unit: str, epsilon: float) -> Drawn:
        """Draws the prompt, from the release that is there already or from a new one, which is charged.

        Raises:
            ContextError: an empty prompt, or one that the text encoder would cut; nothing was spent.
            BudgetExceededError: the ledger refuses; nothing was spent.
        """
        text = " ".join(prompt.split())
        with self._lock:
            self._check(text)
            ledger = self._ledgers[unit]
            known = self._prompt(text)
            context = known.contexts.get(unit)
            again = context is not None and epsilon in context.releases
            if not again:
                picture, report = self._release(text, unit, epsilon)
                context = known.contexts.setdefault(unit, _Context(ledger.entries()[-1].digest))
                context.releases[epsilon] = (picture, report)
            assert context is not None
            picture, report = context.releases[epsilon]
            spent = self._spent(unit, context)
            return Drawn(
                unit=unit,
                epsilon=epsilon,
                plain=known.plain,
                protected=picture,
                again=again,
                right=self._right(picture, known.scene),
                report=_up_to_date(report, spent),
                spent=spent,
                strip=tuple((e, p) for e, (p, _) in sorted(context.releases.items())),
                others=tuple(self._spent(u, c) for u, c in known.contexts.items() if u != unit),
            )

    def _check(self, text: str) -> None:
        if not text:
            raise dpx.ContextError("The prompt is empty: describe a scene. Nothing was spent.")
        length = self.pipeline.tokenizer.model_max_length
        if len(text.split()) + 2 > length or len(self.pipeline.tokenizer(text).input_ids) > length:
            raise dpx.ContextError(
                f"The prompt is longer than the {length} rows of the text encoder: shorten it. Nothing was spent."
            )

    def _prompt(self, text: str) -> _Prompt:
        key = self._ledgers["context"].digest([text.encode()])
        if key not in self._prompts:
            # in earnest nobody draws this one: the UNet receives the private rows
            plain = generate(self.pipeline, [text])[0]
            self._prompts[key] = _Prompt(plain, _scene(text))
        self._prompts.move_to_end(key)
        while len(self._prompts) > MOST_PROMPTS:
            self._prompts.popitem(last=False)
        return self._prompts[key]

    def _release(self, text: str, unit: str, epsilon: float) -> tuple[np.ndarray, dpx.PrivacyReport]:
        protected = dpx.protect(
            self.pipeline,
            config(epsilon, unit=unit),
            calibration=self.calibrations[unit],
            ledger=self._ledgers[unit],
            budget=self.budgets[unit],
            allow_useless=True,  # the page shows what a small epsilon is worth
        )
        with protected:
            return generate(self.pipeline, [text])[0], protected.report()

    def _spent(self, unit: str, context: _Context) -> Spent:
        ledger = self._ledgers[unit]
        releases = len(ledger.charges(context.digest))
        return Spent(unit, ledger.spent(context.digest, DELTA), releases, self.budgets[unit].epsilon)

    def _right(self, picture: np.ndarray, scene: Scene | None) -> tuple[int, int] | None:
        if scene is None:
            return None
        found = score(picture[None], [scene], self._reader).accuracy
        return round(found * scene.n_attributes), scene.n_attributes


def _scene(text: str) -> Scene | None:
    try:
        return parse_caption(text)
    except ValueError:
        return None


def _up_to_date(report: dpx.PrivacyReport, spent: Spent) -> dpx.PrivacyReport:
    """The report of an earlier release, with what its context has spent since."""
    [release] = report.releases
    now = {**release, "charges": spent.releases, "spent_epsilon": spent.epsilon}
    return dataclasses.replace(report, releases=(now,))
