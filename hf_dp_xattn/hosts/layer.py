"""`Layer`: one layer of a host that reads a context: its public shape, and how rows become keys and values by the host's own modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ..calibration.anchors.objective import LayerProbe
from ..mechanisms.base import LayerSpec


class Layer(ABC):
    """name: of the module in its host. module: as the host calls it. heads: of keys and values. key_dim, value_dim: channels of one head.
    scale: factor of the logits; softcap: the host's cap on them, or None. channels: of a row of context space.

    computes: keys and values are computed of a row; else they are entries of it.
    """

    name: str
    module: nn.Module
    heads: int
    key_dim: int
    value_dim: int
    scale: float
    channels: int
    softcap: float | None
    computes: ClassVar[bool] = True

    @property
    def inner_dim(self) -> int:
        """Channels of its keys."""
        return self.heads * self.key_dim

    @property
    def shape(self) -> tuple[str, int, int, int]:
        """What a saved fingerprint knows it by."""
        return self.name, self.heads, self.channels, self.inner_dim

    def parts(self) -> list[nn.Module]:
        """The modules that make keys and values, as they are now."""
        return [self.module]

    @abstractmethod
    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, n, d] and values [B, H, n, dv] of rows [B, n, C] where the weights are."""

    @abstractmethod
    def spec(self, dtype: torch.dtype) -> LayerSpec:
        """Its public shape, and its weights where they are linear maps of a row."""

    @abstractmethod
    def output_gain(self) -> torch.Tensor:
        """[H] mean squared gain from a key head's output channel to the module's output."""


def home(module: nn.Module, default: torch.device) -> torch.device:
    """Where a projection's input must be; an offloaded module (meta weights) moves its input by itself."""
    device = next(module.parameters()).device
    return default if device.type == "meta" else device


def in_range(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers as the mechanism takes them: in its dtype, an overflow at the end of the range, and 0 for NaN (an overflow less another).

    What a cast, an encoder or a projection makes of finite private rows may overflow. A refusal would tell such a context from its
    neighbour for certain; this is one more function of each number alone, and what is far outside is clipped anyway.
    """
    return torch.nan_to_num(numbers.to(dtype), nan=0.0)


def project_batch(layer: Layer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, n, d] of rows [B, n, C], where the layer's weights are; in these weights' precision, since they outlive a
    region of autocast that they may be made in."""
    states = rows.to(home(layer.parts()[0], rows.device))
    with torch.autocast(states.device.type, enabled=False):
        return layer.project(states)


def project_rows(layer: Layer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`project_batch` of one context: keys and values [H, n, d] of rows [n, C]."""
    key, value = project_batch(layer, rows.unsqueeze(0))
    return key[0], value[0]


def project_apart(
    layer: Layer, rows: torch.Tensor, units: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `project_rows`, one unit at a time, each in memory of its own: a product has this unit's rows and public weights as its only data,
    and its shape and alignment, by which a kernel may choose an order of summation, do not tell how many other rows there are.

    units: indices of each unit's rows, together all rows.
    """
    if not layer.computes:
        return project_rows(layer, rows)
    keys, values = zip(*(project_rows(layer, rows[unit.to(rows.device)]) for unit in units), strict=True)
    order = torch.cat(list(units)).argsort().to(keys[0].device)
    return torch.cat(keys, dim=1)[:, order], torch.cat(values, dim=1)[:, order]


@torch.no_grad()
def linear_map(
    apply: Callable[[torch.Tensor], torch.Tensor], module: nn.Module, channels: int, dtype: torch.dtype
) -> torch.Tensor:
    """[out, channels] float32 CPU: the linear map that `apply` is of rows [1, n, channels], its adapters included, where `module` is."""
    device = home(module, torch.device("cpu"))
    identity = torch.eye(channels, dtype=dtype, device=device).unsqueeze(0)
    weight = (apply(identity) - apply(torch.zeros_like(identity[:, :1])))[0].mT
    return weight.to("cpu", torch.float32)


def row_flops(layers: Iterable[Layer]) -> float:
    """Multiplications and additions of one row's keys and values in all layers."""
    return sum(4.0 * layer.channels * layer.inner_dim for layer in layers)


def layer_probes(layers: Iterable[Layer], queries: Sequence[torch.Tensor]) -> list[LayerProbe]:
    """The layers' own projections, their public queries [H, m, d] and gains."""
    return [
        LayerProbe(partial(_project, layer), layer.scale, query.float(), layer.output_gain())
        for layer, query in zip(layers, queries, strict=True)
    ]


def _project(layer: Layer, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return project_batch(layer, rows.to(next(layer.parts()[0].parameters()).dtype))
