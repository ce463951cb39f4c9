"""The ledger of every handle that was given none: ONE for the process, in memory, or the file that `HF_DP_XATTN_LEDGER` names.

A handle comes and goes (`unprotect`, a second pipeline, a host that is loaded anew), and what a context has spent does not: so the account
is not the handle's. It is opened when it is first needed and kept until the process ends. A forked worker is another process: it has
the same releases, and makes no new ones on an account in memory, which could not tell its siblings.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from ..errors import LedgerError
from .ledger import Ledger
from .ledger_places import is_address

VARIABLE = "HF_DP_XATTN_LEDGER"
_FILE = "ledger.json"


class _Kept:
    """named: what `VARIABLE` was when the ledger was opened."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ledger: Ledger | None = None
        self.named: str | None = None


_kept = _Kept()


def _renew() -> None:
    _kept.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def named_path() -> str | None:
    """What `VARIABLE` says, or None where it is not set."""
    return os.environ.get(VARIABLE) or None


def default_ledger() -> Ledger:
    """The process's ledger.

    Raises:
        LedgerError: its file cannot be opened; or the variable was changed since, which would leave what was spent in two accounts.
    """
    named = named_path()
    with _kept.lock:
        if _kept.ledger is None:
            _kept.ledger, _kept.named = Ledger(named), named
        elif named != _kept.named:
            raise LedgerError(
                f"{VARIABLE} was changed after this process had opened its ledger, and what was spent would be counted in two places. Set "
                "it before the first dpx.protect, or pass ledger=dpx.Ledger(path)."
            )
        return _kept.ledger


def is_default(ledger: Ledger) -> bool:
    """Whether it is the process's."""
    return ledger is _kept.ledger


def user_ledger_path() -> str | Path:
    """Where the command line keeps its ledger unless it is told otherwise: what `VARIABLE` says, or a file in the user's cache folder,
    which is made if needed. Raises LedgerError where it cannot be made."""
    named = named_path()
    if named is not None:
        return named if is_address(named) else Path(named).expanduser()
    return user_folder() / _FILE


def user_folder() -> Path:
    """The package's folder in the user's cache folder, which is made if needed. Raises LedgerError where it cannot be made."""
    folder = _cache_folder() / "hf_dp_xattn"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise LedgerError(
            f"The folder of the ledger cannot be made ({type(error).__name__}): pass --ledger FILE, or set {VARIABLE}. Nothing was spent."
        ) from None
    return folder


def _cache_folder() -> Path:
    """XDG_CACHE_HOME where it is set (and absolute, as its specification asks); else the platform's own."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if folder and Path(folder).is_absolute():
        return Path(folder)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    local = os.environ.get("LOCALAPPDATA")
    if sys.platform == "win32" and local:
        return Path(local)
    return Path.home() / ".cache"
