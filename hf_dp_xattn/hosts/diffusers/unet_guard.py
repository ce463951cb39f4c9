"""What the gate of a UNet and the patches of its pipelines ask of the handle that they are installed for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ...config import DPXAttnConfig
from ..access import Access
from ..locks import Lock
from ..placeholder import Tag
from ..promised import Promises
from ..saving import Saved
from ..tables import LayerTable
from ..weight_changes import WeightWatch


class UNetGuard(Protocol):
    """layers: the protected ones, by name. promises: releases that are due. watch, watched: the weights that a release must fit."""

    access: Access
    promises: Promises
    watch: WeightWatch

    @property
    def layers(self) -> Mapping[str, Any]: ...
    @property
    def watched(self) -> list[torch.nn.Module]: ...
    def check(self) -> None: ...
    def activate(self, tags: Sequence[Tag], device: torch.device | str) -> dict[str, LayerTable]: ...
    def hand_out(self, tables: dict[str, LayerTable]) -> None: ...


class PipelineGuard(UNetGuard, Saved, Protocol):
    """config: what is public of a context's length. lock, calling: see `ProtectedPipeline`."""

    config: DPXAttnConfig
    lock: Lock
    calling: Lock

    @property
    def active(self) -> bool: ...
    @property
    def channels(self) -> int: ...
    @property
    def hidden_length(self) -> int: ...
    @property
    def by_phrases(self) -> bool: ...
    def check_thoroughly(self) -> None: ...
    def placeholder(self, tags: Sequence[Tag], rows: int, device: torch.device | str) -> torch.Tensor: ...
