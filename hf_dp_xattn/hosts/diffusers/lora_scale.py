"""The scale of a LoRA that a pipeline's call asks for: set before the call reads a release, and put back behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import ConfigError


@contextmanager
def call_scale(arguments: dict[str, Any], modules: Sequence[Any]) -> Iterator[None]:
    """While it lasts, the active adapters of these modules have the scale that `cross_attention_kwargs={"scale": ...}` names.

    diffusers changes it inside each forward, behind the question whether a release fits the weights. Here it is as after
    `pipe.set_adapters`: a release that was made at another scale does not fit.

    Args:
        arguments: of the call, by name; the scale is taken out of them.
        modules: the parts of the pipeline whose adapters are meant; what is no module is left out.

    Raises:
        ConfigError: the scale is not one finite number. Nothing was changed.
    """
    options = arguments.get("cross_attention_kwargs")
    if not isinstance(options, dict) or "scale" not in options:
        yield
        return
    scale = options["scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ConfigError(
            "The scale in `cross_attention_kwargs` must be one finite number. Nothing was spent."
        )
    arguments["cross_attention_kwargs"] = {n: v for n, v in options.items() if n != "scale"} or None
    roots = [m for m in modules if isinstance(m, nn.Module)]
    layers: dict[int, Any] = {
        id(m): m for root in roots for m in root.modules() if isinstance(m.__dict__.get("scaling"), dict)
    }
    before = [(layer, dict(layer.scaling)) for layer in layers.values()]
    try:
        for layer, _ in before:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in before:
            layer.scaling.update(scaling)  # not divided again, which rounds
