"""Exceptions of the package. Each message says what to do next; none carries private content."""

from __future__ import annotations


class DPXAttnError(Exception):
    """Base of every exception that this package raises on purpose.

    Example:
        >>> try:
        ...     dpx.DPXAttnConfig(epsilon=0.0)
        ... except dpx.DPXAttnError as error:
        ...     print(type(error).__name__)
        ConfigError
    """


class TruncatedPromptWarning(UserWarning):
    """A private prompt is longer than its text encoder reads. For the operator: that it was issued tells how long a prompt is.

    Example:
        >>> warnings.simplefilter("error", dpx.TruncatedPromptWarning)
        >>> config = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="context")
        >>> dpx.protect(pipe, config, allow_uncalibrated=True).release("a red circle " * 100)
        Traceback (most recent call last):
        hf_dp_xattn.errors.TruncatedPromptWarning: ...
    """


class ConfigError(DPXAttnError, ValueError):
    """A parameter, key, shape or file is not valid. Raised before any budget is spent.

    Example:
        >>> dpx.DPXAttnConfig(mechanism="magic")
        Traceback (most recent call last):
        hf_dp_xattn.errors.ConfigError: Unknown mechanism 'magic'; choose one of ...
    """


class ContextError(DPXAttnError, ValueError):
    """The private context itself cannot be released (NaN, wrong rank, no rows). Nothing was released.

    The message names shapes and dtypes only, never values. Nothing was spent, unless an encoder made the NaN: it runs after the charge.

    Example:
        >>> dpx.release_attention(torch.zeros(1, 1, 0, 4), torch.zeros(1, 1, 0, 4), dpx.DPXAttnConfig(mechanism="kernel_sum"))
        Traceback (most recent call last):
        hf_dp_xattn.errors.ContextError: ...
    """


class UnsupportedModelError(DPXAttnError):
    """The model has no attention layers that we know how to protect, or has ways around them.

    Example:
        >>> dpx.protect(torch.nn.Linear(2, 2), dpx.DPXAttnConfig(mechanism="none"))
        Traceback (most recent call last):
        hf_dp_xattn.errors.UnsupportedModelError: ...
    """


class ProtectionLostError(DPXAttnError, RuntimeError):
    """Something replaced or fused what `protect` had installed; the forward was not run.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig(mechanism="none"))
        >>> pipe.unet.fuse_qkv_projections()
        >>> protected.check()
        Traceback (most recent call last):
        hf_dp_xattn.errors.ProtectionLostError: The protection is no longer in place: ...
    """


class BudgetExceededError(DPXAttnError, RuntimeError):
    """The ledger refuses a release: the context's budget would be exceeded. Nothing was computed.

    Example:
        >>> protected = dpx.protect(pipe, epsilon=8.0, calibration=library)
        >>> first = protected.release("a red circle")
        >>> protected.release("a red circle", fresh=True)
        Traceback (most recent call last):
        hf_dp_xattn.errors.BudgetExceededError: ...
    """


class LedgerError(DPXAttnError, RuntimeError):
    """The ledger file is damaged, locked or of another schema; without it no release may be made.

    Example:
        >>> dpx.Ledger("no/such/folder/ledger.json")
        Traceback (most recent call last):
        hf_dp_xattn.errors.LedgerError: The directory of the ledger 'ledger.json' does not exist; create it.
    """


class ReleaseError(DPXAttnError, ValueError):
    """A release is damaged or does not fit the model that it is used with.

    Example:
        >>> release = dpx.protect(pipe, calibration=library).release("a red circle")
        >>> dpx.unprotect(pipe)
        >>> release.inputs()
        Traceback (most recent call last):
        hf_dp_xattn.errors.ReleaseError: The host of this release is no longer protected. ...
    """


class HubError(DPXAttnError, OSError):
    """An upload to the Hub did not take place; the message says why, and that nothing was changed there.

    Example:
        >>> issubclass(dpx.HubError, OSError)
        True
    """
