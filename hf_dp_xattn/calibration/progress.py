"""ONE bar for a whole calibration: an estimate first, and a time left that is made of what steps have taken so far."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")
_SHORT = 5.0  # seconds for which nothing needs to be estimated
_SURE = 8  # timed steps after which a stage's seconds are known


@dataclass
class _Stage:
    """steps, of which `left` are left. guess: seconds of one, until some were timed. most: seconds that it may take. decides: nothing is
    estimated before some of its steps were timed. timed, spent: how many, and their seconds."""

    left: int
    guess: float
    most: float = math.inf
    decides: bool = False
    timed: int = 0
    spent: float = 0.0

    @property
    def each(self) -> float:
        """Seconds of one step."""
        return self.spent / self.timed if self.timed else self.guess

    @property
    def seconds(self) -> float:
        """Of what is left."""
        return min(self.left * self.each, max(0.0, self.most - self.spent))

    @property
    def known(self) -> bool:
        """Whether there is something to estimate from."""
        return not self.decides or not self.left or self.timed >= _SURE


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
        self._shown = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.close()

    def say(self, words: str) -> None:
        """A line above the bar.

        Args:
            words: that follow the label.
        """
        if not self._bar.disable:
            self._bar.write(f"{self._label}: {words}", file=self._bar.fp)

    def expect(
        self, stage: str, steps: int, guess: float, *, most: float = math.inf, decides: bool = False
    ) -> None:
        """Announces a stage, or says anew what is left of it.

        Args:
            stage: its name, which is shown. steps: how many. guess: seconds of one. most: seconds of all of them, at most. decides: it is
                the longest, so that no estimate is given before some of its steps were timed.
        """
        self._stages[stage] = _Stage(steps, guess, most, decides)

    def each(self, stage: str) -> float:
        """Seconds of one step of a stage, as far as is known.

        Args:
            stage: one that was announced.
        """
        return self._stages[stage].each

    def track(self, items: Iterable[T], stage: str, total: int | None = None) -> Iterator[T]:
        """The items, each of them a step; a stage that was not announced is now. What is left out at the end is not waited for.

        Args:
            items: what is gone through. stage: its name. total: how many, where they have no length.
        """
        steps = total if total is not None else len(items) if isinstance(items, Sized) else 0
        if stage in self._stages:
            self._stages[stage].left = steps
        else:
            self.expect(stage, steps, 0.0)
        self.begin()
        try:
            for item in items:
                yield item
                self.step(stage)
        finally:
            self.end(stage)

    def end(self, stage: str) -> None:
        """Nothing is left of a stage.

        Args:
            stage: one that was announced.
        """
        self._stages[stage].left = 0
        self.begin()

    def begin(self) -> None:
        """The next step starts now: what went before is no part of it."""
        self._last = time.perf_counter()

    def step(self, stage: str, steps: int = 1, *, timed: bool = True) -> None:
        """So many steps of a stage are done.

        Args:
            stage: one that was announced. steps: how many. timed: False: they were there already, and tell nothing about the others.
        """
        now = time.perf_counter()
        current = self._stages[stage]
        current.left = max(0, current.left - steps)
        if timed:
            current.timed, current.spent = current.timed + steps, current.spent + now - self._last
        self._last = now
        self._show(stage, now - self._start)

    @property
    def seconds_left(self) -> float:
        """Of all stages together."""
        return sum(stage.seconds for stage in self._stages.values())

    def _show(self, stage: str, gone: float) -> None:
        left = self.seconds_left
        if not self._shown and gone + left > _SHORT and all(s.known for s in self._stages.values()):
            self.say(f"about {in_words(gone + left)}")
            self._shown = True
        # never backwards, whatever is learnt about what is left
        self._bar.n = max(self._bar.n, gone / max(gone + left, 1e-9))
        self._bar.set_description_str(
            f"{self._label}: {stage}, {in_words(left)} left" if left else self._label
        )


class _Quiet(Progress):
    """Of what is not shown by itself: keeps nothing, so that one serves all."""

    def expect(self, *args: Any, **kwargs: Any) -> None: ...

    def step(self, *args: Any, **kwargs: Any) -> None: ...

    def end(self, stage: str) -> None: ...

    def each(self, stage: str) -> float:
        return 0.0

    def track(self, items: Iterable[T], stage: str, total: int | None = None) -> Iterator[T]:
        return iter(items)


QUIET: Progress = _Quiet(False, "")


def in_words(seconds: float) -> str:
    """As one says it: "40 s", "6 minutes", "2 h 10 min"."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return "1 minute" if minutes == 1 else f"{minutes} minutes"
    return f"{minutes // 60} h {minutes % 60} min"
