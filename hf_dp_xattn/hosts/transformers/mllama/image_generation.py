"""`generate` of a protected model, shadowed by an instance attribute: an image is released before transformers sees it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...bindings import unique
from ...placeholder import read_tags
from ..encoder_decoder.document_generation import GenerateShadow
from ..encoder_decoder.dry_run import dry_run
from ..generating import named_arguments, while_protected
from .image_contexts import IMAGE_INPUTS
from .mllama_probing import STATES

if TYPE_CHECKING:
    from .mllama_handle import ProtectedImageText


class ImageGenerateShadow(GenerateShadow):
    """As for encoder-decoder models; a call without an image is the host's own."""

    _handle: ProtectedImageText

    def _generate(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        self._handle.check_thoroughly()
        arguments = named_arguments(bound)
        image = {n: arguments[n] for n in IMAGE_INPUTS if arguments.get(n) is not None}
        if self._handle.access.public or not image:
            return original(*bound.args, **bound.kwargs)
        config = arguments.get("generation_config") or self._model.generation_config
        self._check(arguments, config)
        for name in IMAGE_INPUTS:
            arguments.pop(name, None)
        states = self._handle.stand_in(image, arguments)
        if self._handle.promises.due(unique(read_tags(states))):
            zeros = self._handle.zeros_for(states, arguments)
            dry_run(self._handle, original, arguments, {STATES: zeros}, steps=1)
        with while_protected(self._handle):
            return original(**arguments, **{STATES: states})
