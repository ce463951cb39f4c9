"""Models for commands that try a protection out (audit, bench, demo): loaded, unprotected, with the settings to protect them by."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .models import protected_model
from .texts import load_tokenizer


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

    handle = protected_model(args, Ledger())
    host = handle.unet if handle.text is None else handle.text.pipe
    handle.unprotect()
    tokenizer = None
    if handle.text is None:
        try:
            tokenizer = load_tokenizer(args.model)
        except ConfigError:
            tokenizer = None  # canaries of token ids then
    else:
        host.set_progress_bar_config(disable=True)
    return TrialHost(host, handle.config, handle.calibration, tokenizer)


def read_texts(file: str, option: str) -> list[str]:
    """The lines of a text file, stripped, without empty ones.

    Raises:
        ConfigError: not readable, or fewer than two lines. The message quotes nothing.
    """
    try:
        lines = Path(file).read_bytes().decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{option} takes the name of a text file in UTF-8, one text a line ({type(error).__name__})."
        ) from None
    texts = [line.strip() for line in lines if line.strip()]
    if len(set(texts)) < 2 or len(set(texts)) < len(texts):
        raise ConfigError(f"The file of {option} must hold at least two texts, each once.")
    return texts
