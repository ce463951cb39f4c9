"""Encoders are tried on public stand-ins before a charge: what fails whatever the context holds costs nothing."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from ..config import DPXAttnConfig
from ..errors import ContextError, DPXAttnError
from ..privacy.units import public_counts
from .context import PrivateContext


def rehearse(contexts: Iterable[PrivateContext], channels: int, config: DPXAttnConfig) -> None:
    """Each trial of these contexts, one for each size.

    Raises:
        ContextError: an encoder fails on any context of this size, or gives rows of other channels than the layers take.
    """
    done: set[Hashable] = set()
    for context in contexts:
        for trial in context.trials:
            if trial.size in done:
                continue
            done.add(trial.size)
            reason: str | None = None
            try:
                rows = trial.run()
            except DPXAttnError:
                raise
            except Exception as error:
                # its words are of a public stand-in, and of the context's size
                reason = type(error).__name__ + (f": {error}" if _has_public_size(context, config) else "")
            if reason is not None:  # raised here, it does not hold the other as its context
                raise ContextError(
                    f"The encoder fails on any context of this size, whatever it holds ({reason}). Nothing was spent."
                )
            if rows.ndim != 2 or rows.shape[-1] != channels:
                raise ContextError(
                    f"The encoder gives rows of {rows.shape[-1]} channels, the layers take {channels}: it belongs to another model. "
                    "Nothing was spent."
                )


def _has_public_size(context: PrivateContext, config: DPXAttnConfig) -> bool:
    return context.padded or public_counts(config.unit, config.neighboring, 1, 1)["rows"] is not None
