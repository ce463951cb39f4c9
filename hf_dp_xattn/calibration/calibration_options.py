"""What `calibrate` was asked for, as one value."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .anchors.anchors_fit import AnchorSettings
from .anchors.slot_plans import TRAINING
from .checkpoints import NOTHING_KEPT, Checkpoints
from .library.metric import Responses
from .progress import QUIET, Progress, in_words

DEFAULT_MINUTES = 10.0
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments of `dpx.calibrate`, which says what each is.

    queries_per_step counts for each sampled token or denoising step; None of query_prompts, query_steps and steps: the host's own default.
    started: when, by `time.monotonic`; what the host has taken since is part of `minutes`.
    progress: the bar of all of it; shown: whether a library shows its own. kept: its checkpoints.
    """

    epsilons: Sequence[float] = EPSILONS
    anchors: int | None = None
    releases: tuple[str, ...] = AnchorSettings.releases
    steps: int | None = None
    minutes: float | None = None
    grouping: str | None = None
    memory_mb: int = 2048
    rank: int = 128
    query_prompts: int | None = None
    query_steps: int | None = None
    queries_per_step: int = 32
    seed: int = 0
    progress: Progress = QUIET
    kept: Checkpoints = NOTHING_KEPT
    public_head: Any = 0
    questions: Sequence[Any] | None = None
    prefix_bucket: int | None = None
    replies: int = 0
    tokenizer: Any = None
    encoder: Any = None
    expand: bool | int = False
    responses: Responses | None = None
    processes: bool = False
    shown: bool = True
    started: float = field(default_factory=time.monotonic)

    def anchor_settings(self, **more: Any) -> AnchorSettings:
        """Those of a fit of `anchors`, with its default schedule; more: further fields."""
        return AnchorSettings(
            epsilons=tuple(map(float, self.epsilons)),
            releases=self.releases,
            anchors=self.anchors,
            seed=self.seed,
            progress=self.progress,
            kept=self.kept,
            seconds=self.seconds,
            **more,
        )

    def announce(self, mechanism: str) -> None:
        """What is known before anything was encoded: `anchors` has a limit, and its training decides how long it takes."""
        if mechanism == "anchors":
            seconds = self.seconds
            if seconds is not None:
                self.progress.say(f"{in_words(60 * (self.minutes or DEFAULT_MINUTES))} at most, about")
            self.progress.expect(TRAINING, self.steps or 3000, 0.1, most=seconds or math.inf, decides=True)

    @property
    def seconds(self) -> float | None:
        """What is left for training decoders: 60 % of the rest of `minutes`, which codebooks and judging need as well. None: no limit,
        where steps are asked for."""
        if self.minutes is None and self.steps is not None:
            return None
        minutes = DEFAULT_MINUTES if self.minutes is None else self.minutes
        left = 60.0 * minutes - (time.monotonic() - self.started)
        return max(0.1 * 60.0 * minutes, 0.6 * left)

    @property
    def texts(self) -> int:
        """Of models that generate text: public contexts about which texts are sampled."""
        return self.query_prompts or 8

    @property
    def tokens(self) -> int:
        """Of models that generate text: tokens that are sampled of each."""
        return self.query_steps or 16

    @property
    def queries(self) -> int:
        """Of models that generate text: public queries of each layer that are kept."""
        return self.queries_per_step * self.tokens
