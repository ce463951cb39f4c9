"""NaN is how a placeholder or a lost layer shows: it holds nothing private, and it never leaves as if it were an answer."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ProtectionLostError

FOUND = (
    "The output of a protected host is NaN and was not handed on; nothing private is in it. Either the placeholder of a release was read "
    "by something that is not protected (a ControlNet, a replaced layer; it holds NaN for that reason), or the host overflows by itself, "
    "as float16 does: run it once with a public text inside `with protected.public():`, or in bfloat16 or float32, to tell which."
)


@torch.no_grad()
def refuse_nan(output: Any) -> None:
    """Raises ProtectionLostError where a tensor holds NaN. One reduction; waits for the device."""
    answers = isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel() > 0
    if answers and bool(
        output.amax().isnan()
    ):  # a maximum over NaN is NaN; it needs no mask of the output's size
        raise ProtectionLostError(FOUND)


def main_output(output: Any) -> Any:
    """The tensor of a model's output that answers: logits, hidden states or a sample."""
    for name in ("sample", "logits", "last_hidden_state"):
        tensor = getattr(output, name, None)
        if isinstance(tensor, torch.Tensor):
            return tensor
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return next((p for p in parts if isinstance(p, torch.Tensor) and p.ndim > 1), None)
