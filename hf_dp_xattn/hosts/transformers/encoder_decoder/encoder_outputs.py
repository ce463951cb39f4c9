"""What stands in for the encoder's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput


@dataclass
class PlaceholderOutputs(BaseModelOutput):
    """`encoder_outputs` whose last hidden state is a placeholder; other fields that some models look for are empty."""

    attention_mask: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def last_hidden_state(outputs: Any) -> torch.Tensor | None:
    """The tensor in `encoder_outputs` as hosts accept it (an output object, a tuple, a tensor), or None."""
    if isinstance(outputs, dict):  # output objects are dicts
        outputs = outputs.get("last_hidden_state")
    elif isinstance(outputs, (tuple, list)):
        outputs = outputs[0] if outputs else None
    return outputs if isinstance(outputs, torch.Tensor) else None
