"""A private context that the caller encodes: prompt weighting, other layers of the text encoder, libraries that run it by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..access import Access


class EncodesByHand:
    """Part of a handle."""

    access: Access

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """Inside, the host's encoder runs for the caller, on PRIVATE text: for prompt weighting and the like.

        What it returns is exact and private, and in the caller's hands; nothing is charged yet. Pass it on as a private context:
        `pipe(prompt_embeds=...)`, `protected.release(embeds)`, `model.generate(encoder_outputs=...)`, which release and charge it under its
        own name (not that of its text). A protected UNet or model refuses it by itself in any other place; beside a placeholder
        in one batch, or as a negative prompt, it counts as public, and nothing else refuses it: keep to encoding inside, and give the
        result to nothing else.
        """
        with self.access.enter("encoding"):
            yield
