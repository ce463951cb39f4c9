"""What may be said of lengths: a release says how long its context was only where all neighbours are as long."""

from __future__ import annotations

import torch

HIDDEN = 77  # length of a placeholder that must not tell the number of rows, where no tokenizer has a length


def dimensions(tensor: torch.Tensor) -> str:
    """What a message may say of a private tensor's shape: sizes may be numbers of rows."""
    return f"{tensor.ndim} dimension{'' if tensor.ndim == 1 else 's'} of {str(tensor.dtype).removeprefix('torch.')}"
