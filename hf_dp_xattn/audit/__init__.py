"""Leak tests, empirical epsilon and extraction of canaries, against a protection on one's own model. See docs/audit.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audit_report import AuditReport, Check, EpsilonBound, Extraction
    from .auditing import audit

# Imported when first used, so that the command line's help loads no torch.
_HOME_OF = {
    "audit": "auditing",
    "AuditReport": "audit_report",
    "Check": "audit_report",
    "EpsilonBound": "audit_report",
    "Extraction": "audit_report",
}

__all__ = ["AuditReport", "Check", "EpsilonBound", "Extraction", "audit"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
