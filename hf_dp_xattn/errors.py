"""Exceptions of the package. Each message says what to do next; none carries private content."""

from __future__ import annotations


class DPXAttnError(Exception):
    """Base of every exception that this package raises on purpose."""


class TruncatedPromptWarning(UserWarning):
    """A private prompt is longer than its text encoder reads. For the operator: that it was issued tells how long a prompt is."""


class ConfigError(DPXAttnError, ValueError):
    """A parameter, key, shape or file is not valid. Raised before any budget is spent."""


class ContextError(DPXAttnError, ValueError):
    """The private context itself cannot be released (NaN, wrong rank, no rows). Nothing was released.

    The message names shapes and dtypes only, never values. Nothing was spent, unless an encoder made the NaN: it runs after the charge.
    """


class UnsupportedModelError(DPXAttnError):
    """The model has no attention layers that we know how to protect, or has ways around them."""


class ProtectionLostError(DPXAttnError, RuntimeError):
    """Something replaced or fused what `protect` had installed; the forward was not run."""


class BudgetExceededError(DPXAttnError, RuntimeError):
    """The ledger refuses a release: the context's budget would be exceeded. Nothing was computed."""


class LedgerError(DPXAttnError, RuntimeError):
    """The ledger file is damaged, locked or of another schema; without it no release may be made."""


class ReleaseError(DPXAttnError, ValueError):
    """A release is damaged or does not fit the model that it is used with."""


class HubError(DPXAttnError, OSError):
    """An upload to the Hub did not take place; the message says why, and that nothing was changed there."""
