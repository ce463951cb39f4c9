"""Differentially private cross-attention for Hugging Face models: release a private context once, serve every query from it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .calibration.calibration import Calibration
    from .calibration.library.text_library import TextLibrary
    from .calibration.planner import Plan, plan
    from .calibration.shipped_prompts import public_prompts
    from .config import DPXAttnConfig
    from .errors import (
        BudgetExceededError,
        ConfigError,
        ContextError,
        DPXAttnError,
        HubError,
        LedgerError,
        ProtectionLostError,
        ReleaseError,
        TruncatedPromptWarning,
        UnsupportedModelError,
    )
    from .hosts.calibrate import calibrate
    from .hosts.compare import Comparison, compare
    from .hosts.diffusers.phrases import split_phrases
    from .hosts.diffusers.processor import DPAttnProcessor
    from .hosts.protect import Release, handle_of, protect, unprotect
    from .hosts.restoring import from_pretrained
    from .hosts.transformers.decoder_only.chat import SplitChat, split_chat
    from .mechanisms.release_attention import release_attention
    from .privacy.ledger import Budget, Ledger
    from .report import Guarantee, PrivacyReport

__version__ = "0.2.0"

# Where each public name lives. Imported when first used, so that `import hf_dp_xattn` does not load torch or diffusers.
_HOMES = {
    "config": ("DPXAttnConfig",),
    "errors": (
        "BudgetExceededError",
        "ConfigError",
        "ContextError",
        "DPXAttnError",
        "HubError",
        "LedgerError",
        "ProtectionLostError",
        "ReleaseError",
        "TruncatedPromptWarning",
        "UnsupportedModelError",
    ),
    "report": ("Guarantee", "PrivacyReport"),
    "calibration.calibration": ("Calibration",),
    "calibration.library.text_library": ("TextLibrary",),
    "calibration.planner": ("Plan", "plan"),
    "calibration.shipped_prompts": ("public_prompts",),
    "hosts.calibrate": ("calibrate",),
    "hosts.compare": ("Comparison", "compare"),
    "hosts.transformers.decoder_only.chat": ("SplitChat", "split_chat"),
    "hosts.diffusers.phrases": ("split_phrases",),
    "hosts.diffusers.processor": ("DPAttnProcessor",),
    "hosts.protect": ("Release", "handle_of", "protect", "unprotect"),
    "hosts.restoring": ("from_pretrained",),
    "mechanisms.release_attention": ("release_attention",),
    "privacy.ledger": ("Budget", "Ledger"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Budget",
    "BudgetExceededError",
    "Calibration",
    "Comparison",
    "ConfigError",
    "ContextError",
    "DPAttnProcessor",
    "DPXAttnConfig",
    "DPXAttnError",
    "Guarantee",
    "HubError",
    "Ledger",
    "LedgerError",
    "Plan",
    "PrivacyReport",
    "ProtectionLostError",
    "Release",
    "ReleaseError",
    "SplitChat",
    "TextLibrary",
    "TruncatedPromptWarning",
    "UnsupportedModelError",
    "__version__",
    "calibrate",
    "compare",
    "from_pretrained",
    "handle_of",
    "plan",
    "protect",
    "public_prompts",
    "release_attention",
    "split_chat",
    "split_phrases",
    "unprotect",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
