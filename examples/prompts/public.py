"""The system prompts that are shipped with the package, split by id: seven eighths are public, one is held out."""

from __future__ import annotations

from hf_dp_xattn.calibration.shipped_prompts import ShippedPrompt as Prompt
from hf_dp_xattn.calibration.shipped_prompts import system_prompts

__all__ = ["Prompt", "prompts"]


def prompts(*, held_out: bool) -> list[Prompt]:
    """All prompts of one part, in the file's order."""
    return [p for p in system_prompts() if p.held_out is held_out]
