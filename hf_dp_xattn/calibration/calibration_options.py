"""What `calibrate` was asked for, as one value."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .anchors.anchors_fit import AnchorSettings

DEFAULT_MINUTES = 10.0
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments of `dpx.calibrate`, which says what each is.

    queries_per_step counts for each sampled token or denoising step; None of query_prompts, query_steps and steps: the host's own default.
    started: when, by `time.monotonic`; what the host has taken since is part of `minutes`.
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
    progress: bool = True
    public_head: Any = 0
    questions: Sequence[Any] | None = None
    prefix_bucket: int | None = None
    replies: int = 0
    started: float = field(default_factory=time.monotonic)

    def anchor_settings(self, **more: Any) -> AnchorSettings:
        """Those of a fit of `anchors`, with its default schedule; more: further fields."""
        return AnchorSettings(
            epsilons=tuple(map(float, self.epsilons)),
            releases=self.releases,
            anchors=self.anchors,
            seed=self.seed,
            progress=self.progress,
            seconds=self.seconds,
            **more,
        )

    @property
    def seconds(self) -> float | None:
        """What is left for training decoders: three quarters of the rest of `minutes`, which judging them needs as well. None: no limit,
        where steps are asked for."""
        if self.minutes is None and self.steps is not None:
            return None
        minutes = DEFAULT_MINUTES if self.minutes is None else self.minutes
        left = 60.0 * minutes - (time.monotonic() - self.started)
        return max(0.1 * 60.0 * minutes, 0.75 * left)

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
