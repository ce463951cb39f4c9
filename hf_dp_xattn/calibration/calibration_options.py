"""What `calibrate` was asked for, as one value that the hosts' own ways of fitting are handed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .anchors.anchors_fit import AnchorSettings


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments of `hosts.calibrate.calibrate`, which says what each is.

    queries_per_step counts for each sampled token or denoising step; None of query_prompts, query_steps and steps: the host's own default.
    """

    epsilons: Sequence[float]
    anchors: int
    releases: tuple[str, ...]
    steps: int | None
    grouping: str | None
    memory_mb: int
    rank: int
    query_prompts: int | None
    query_steps: int | None
    queries_per_step: int
    seed: int
    progress: bool
    public_head: Any
    questions: Sequence[Any] | None
    prefix_bucket: int | None
    replies: int

    def anchor_settings(self, **more: Any) -> AnchorSettings:
        """Those of a fit of `anchors`, with its default schedule; more: further fields."""
        return AnchorSettings(
            releases=self.releases, anchors=self.anchors, seed=self.seed, progress=self.progress, **more
        )

    def queries_of_texts(self) -> tuple[int, int, int]:
        """For models that generate text: (contexts that are asked, tokens that are sampled, queries of each layer)."""
        sampled = self.query_steps or 16
        return self.query_prompts or 8, sampled, self.queries_per_step * sampled
