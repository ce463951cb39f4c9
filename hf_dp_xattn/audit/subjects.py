"""What is tried: a host that is not protected, with the settings to protect it by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..hosts.accounts import STAYS
from ..hosts.driver import Driver
from ..hosts.host_registry import driver_for
from ..hosts.protect import handle_of, protect
from ..privacy.ledger import Budget, Ledger

MANY = 1000  # releases that the ledger of an audit of groups has room for


def subject_of(host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None) -> Driver:
    """The driver of a host that is not protected.

    Raises:
        UnsupportedModelError: see `protect`. ConfigError: it is protected already, or there is nothing to try.
    """
    if handle_of(host) is not None:
        raise ConfigError(
            "This host is protected: call dpx.unprotect(host) first. It is protected here with a ledger of its own, and left "
            f"unprotected ({STAYS})."
        )
    subject = driver_for(host, config)(host, config, calibration, tokenizer, protect=_protected)
    subject.check_trial()
    return subject


@contextmanager
def _protected(subject: Driver, config: DPXAttnConfig) -> Iterator[Any]:
    """The handle, with a ledger in memory that nobody else has; unprotected at the end."""
    # canaries that are groups stand beside the same others, and a document that is released again is charged again
    budget = Budget(MANY * config.epsilon, min(0.5, MANY * config.delta)) if subject.by_groups else None
    handle = protect(
        subject.host,
        config,
        calibration=subject.calibration,
        ledger=Ledger(),
        budget=budget,
        allow_useless=True,  # what it gives away is asked here, not what it is worth
        allow_uncalibrated=True,
        allow_large_epsilon=True,
        tokenizer=None if subject.layered else subject.tokenizer,
    )
    try:
        yield handle
    finally:
        handle.unprotect()
