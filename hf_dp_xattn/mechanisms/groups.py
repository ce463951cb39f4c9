"""Groups as users have them: lists, arrays and tensors of integers."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError

NO_GROUPS = (
    "`groups` must be integers [n], one for each row: a list, an array or a tensor; nothing was spent."
)


def as_groups(groups: Any) -> Any:
    """A tensor of a list, tuple or array of integers; a tensor, a word ("phrases", ...) and None as they are, for who knows them to check.

    Raises:
        ConfigError: it holds something else than integers. The message quotes nothing.
    """
    if groups is None or isinstance(groups, (str, torch.Tensor)):
        return groups
    try:
        tensor = torch.as_tensor(groups)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ConfigError(NO_GROUPS) from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ConfigError(NO_GROUPS)
    return tensor
