"""Lengths that may leave: a release says how long its context was only where all neighbours are as long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..privacy.units import public_counts

if TYPE_CHECKING:
    from ..config import DPXAttnConfig
    from .context import PrivateContext

HIDDEN = 77  # length of a placeholder that must not tell the number of rows, where no tokenizer has a length


def public_length(context: PrivateContext, config: DPXAttnConfig, hidden: int) -> int:
    """Length of the placeholder of a context's release: its rows where they are padded to a public number or where the neighbouring
    relation makes their number public; else `hidden`, whatever the context."""
    counts = public_counts(config.unit, config.neighboring, context.rows, 0)
    return context.rows if context.padded or counts["rows"] is not None else hidden


def dimensions(tensor: torch.Tensor) -> str:
    """What a message may say of a private tensor's shape: sizes may be numbers of rows."""
    return f"{tensor.ndim} dimension{'' if tensor.ndim == 1 else 's'} of {str(tensor.dtype).removeprefix('torch.')}"
