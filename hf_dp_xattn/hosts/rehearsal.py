"""Encoders are tried on public stand-ins before a charge: what fails whatever the context holds costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..errors import ContextError, DPXAttnError

if TYPE_CHECKING:
    from .context import PrivateContext


@dataclass(frozen=True)
class Trial:
    """An encoding of something public. size: what tells it from others, public. run: gives rows [n, C]."""

    size: Hashable
    run: Callable[[], torch.Tensor]


def rehearse(contexts: Iterable[PrivateContext], channels: int) -> None:
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
            try:
                rows = trial.run()
            except DPXAttnError:
                raise
            except Exception as error:  # of a public stand-in, so its words may be told
                raise ContextError(
                    f"The encoder fails on any context of this size, whatever it holds ({type(error).__name__}: {error}). Nothing was "
                    "spent."
                ) from error
            if rows.ndim != 2 or rows.shape[-1] != channels:
                raise ContextError(
                    f"The encoder gives rows {list(rows.shape)}, and the layers take [n, {channels}]: it belongs to another model. Nothing "
                    "was spent."
                )
