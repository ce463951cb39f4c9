"""ONE bar for a whole calibration: an estimate first, and a time left that is made of what steps have taken so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Self

from tqdm.auto import tqdm

_SHORT = 5.0  # seconds for which nothing needs to be estimated


@dataclass
class _Stage:
    """steps, of which `left` are left. guess: seconds of one, until some were timed. timed, spent: how many, and their seconds."""

    left: int
    guess: float
    timed: int = 0
    spent: float = 0.0

    @property
    def seconds(self) -> float:
        """Of what is left."""
        return self.left * (self.spent / self.timed if self.timed else self.guess)


class Progress:
    """A bar over stages that are known before they begin; a context manager.

    Args:
        shown: False: silent.
        label: what is made, in a word.
    """

    def __init__(self, shown: bool, label: str) -> None:
        self._bar: tqdm[Any] = tqdm(
            total=1.0, disable=not shown, desc=label, bar_format="{desc} {percentage:3.0f}%|{bar}|"
        )
        self._label = label
        self._stages: dict[str, _Stage] = {}
        self._start = self._last = time.perf_counter()
        self._told = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def expect(self, stage: str, steps: int, guess: float) -> None:
        """Announces a stage, or more steps of it.

        Args:
            stage: its name, which is shown. steps: how many. guess: seconds of one.
        """
        known = self._stages.get(stage)
        self._stages[stage] = _Stage(steps + (known.left if known else 0), guess)

    def begin(self) -> None:
        """The next step starts now: what went before is no part of it."""
        self._last = time.perf_counter()

    def step(self, stage: str, steps: int = 1, *, timed: bool = True) -> None:
        """So many steps of a stage are done.

        Args:
            stage: one that was announced. steps: how many. timed: False: they were there already, and tell nothing about the others.
        """
        now = time.perf_counter()
        own = self._stages[stage]
        own.left = max(0, own.left - steps)
        if timed:
            own.timed, own.spent = own.timed + steps, own.spent + now - self._last
        self._last = now
        self._show(stage, now - self._start)

    @property
    def seconds_left(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self._stages.values())

    def _show(self, stage: str, gone: float) -> None:
        left = self.seconds_left
        if not self._told and gone + left > _SHORT and not self._bar.disable:
            self._bar.write(f"{self._label}: about {in_words(gone + left)}", file=self._bar.fp)
            self._told = True
        # never backwards, whatever is learnt about what is left
        self._bar.n = max(self._bar.n, gone / max(gone + left, 1e-9))
        self._bar.set_description_str(
            f"{self._label}: {stage}, {in_words(left)} left" if left else self._label
        )


def in_words(seconds: float) -> str:
    """As one says it: "40 s", "6 minutes", "2 h 10 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return "1 minute" if minutes == 1 else f"{minutes} minutes"
    return f"{minutes // 60} h {minutes % 60} min"
