"""`generate` of a protected model, shadowed by an instance attribute: an image is released before transformers sees it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch

from ...bindings import unique
from ...placeholder import read_tags
from ..encoder_decoder.document_generation import Generates, GenerateShadow
from ..generating import generation_settings, named_arguments, while_protected
from .image_contexts import IMAGE_INPUTS
from .mllama_probing import STATES


class GeneratesFromImages(Generates, Protocol):
    """stand_in: the placeholder of an image. zeros_for: rows of an image of zeros in its place."""

    def stand_in(self, image: dict[str, Any], text: dict[str, Any]) -> torch.Tensor: ...
    def zeros_for(self, states: torch.Tensor, text: dict[str, Any]) -> torch.Tensor: ...


class ImageGenerateShadow(GenerateShadow):
    """As for encoder-decoder models; a call without an image is the host's own."""

    def __init__(self, host: GeneratesFromImages) -> None:
        super().__init__(host)
        self._images = host

    def _generate(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._host.guard.check_thoroughly()
        arguments = named_arguments(bound)
        image = {n: arguments[n] for n in IMAGE_INPUTS if arguments.get(n) is not None}
        if self._host.guard.access.public or not image:
            return original(*bound.args, **bound.kwargs)
        config = generation_settings(self._model, arguments)
        self._check(arguments, config)
        for name in IMAGE_INPUTS:
            arguments.pop(name, None)
        states = self._images.stand_in(image, arguments)
        if self._host.guard.promises.due(unique(read_tags(states))):
            zeros = self._images.zeros_for(states, arguments)
            self._dry_run(1, original, arguments, {STATES: zeros})
        with while_protected(self._host.guard.check):
            return original(**arguments, **{STATES: states})
