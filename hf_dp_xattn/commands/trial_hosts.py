"""Models for commands that try a protection out (audit, bench, demo): loaded, unprotected, with the settings to protect them by."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..records import read_records
from .models import (
    ANYTHING,
    check_settings,
    config_of,
    is_protected,
    load_plain,
    load_tokenizer,
    parse_dtype,
    protect_host,
    protected_model,
)
from .quick_library import quick_library


@dataclass(frozen=True, eq=False)
class TrialHost:
    """host: not protected. tokenizer: None for pipelines (which have their own) and where there is none."""

    host: Any
    config: Any
    calibration: Any
    tokenizer: Any


def load_trial(args: argparse.Namespace) -> TrialHost:
    """The model that the options describe (`models.add_protection`), plain or saved with a protection.

    It is protected once, with a ledger in memory, so that whatever does not fit is refused here.

    Raises:
        ConfigError, UnsupportedModelError: see `models.protected_model`.
    """
    from ..privacy.ledger import Ledger

    bare = (args.mechanism, args.calibration, args.config) == (None, None, None)
    handle = (
        _by_library(args)
        if bare and not is_protected(args.model)
        else protected_model(args, Ledger(), trial=True)
    )
    host = handle.host.parts[0]
    handle.unprotect()
    tokenizer = None
    if not hasattr(host, "components"):
        try:
            tokenizer = load_tokenizer(args.model)
        except ConfigError:
            tokenizer = None  # canaries of token ids then
    else:
        host.set_progress_bar_config(disable=True)
    return TrialHost(host, handle.config, handle.calibration, tokenizer)


def _by_library(args: argparse.Namespace) -> Any:
    """The handle of a plain model of which no more is said: a library of the shipped prompts serves it."""
    from ..privacy.ledger import Ledger

    check_settings(args)
    host = load_plain(args.model, parse_dtype(args.dtype))
    library = quick_library(host, args)
    config = config_of(args, library)
    return protect_host(host, args.model, config, calibration=library, ledger=Ledger(), **ANYTHING)


def read_texts(file: str, option: str) -> list[str]:
    """The records of a text file.

    Raises:
        ConfigError: not readable, or fewer than two lines. The message quotes nothing.
    """
    texts = read_records(file, option)
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise ConfigError(f"The file of {option} must hold at least two texts, each once.")
    return texts
