"""A prompt longer than its text encoder reads: a warning that holds no content, and nothing for others."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_dp_xattn as dpx

from ...hosts_tiny import LENGTH, picture, tiny_sd
from ..anchor_calibrations import protect

FITS = "z" * (LENGTH - 2)  # one token a letter, and the first and last ones
LONG = FITS + "ebra"
CONFIG = dpx.DPXAttnConfig(mechanism="kernel_sum", unit="row", degree=1, projection_dim=2)
CALLS: dict[str, Callable[[Any, Any, str], Any]] = {
    "a release": lambda pipe, handle, text: handle.release(text),
    "a batch": lambda pipe, handle, text: handle.release(["a", text]),
    "the pipeline": lambda pipe, handle, text: picture(pipe, text),
}


def told(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, dpx.TruncatedPromptWarning)]


@pytest.mark.parametrize("call", CALLS)
def test_it_is_told_without_content(call: str, pipe: Any) -> None:
    handle = protect(pipe, CONFIG)
    assert not told(lambda: CALLS[call](pipe, handle, FITS))
    (one, *more) = told(lambda: CALLS[call](pipe, handle, LONG))
    assert not more and "zz" not in one and "ebra" not in one
    assert not any(c.isdigit() for c in one)  # nor how long it is
    (other,) = told(lambda: CALLS[call](pipe, handle, 2 * LONG))
    assert one == other


def test_each_long_phrase(pipe: Any) -> None:
    handle = protect(pipe, CONFIG.replace(unit="group"))
    many = ", ".join(["a cat"] * 4)  # together too long, which says nothing about a phrase
    assert not told(lambda: handle.release(many, groups="phrases"))
    assert len(told(lambda: handle.release(["a cat", LONG], groups="phrases"))) == 1


def test_public_words_and_silence(pipe: Any) -> None:
    handle = protect(pipe, CONFIG)
    release = handle.release("a cat")
    assert not told(lambda: release.inputs(prompt=LONG))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=dpx.TruncatedPromptWarning)
        handle.release(LONG)


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "hf_dp_xattn",
        "release",
        str(tmp_path / "model"),
        "--mechanism",
        "kernel_sum",
    ]
    command += [
        "--allow-uncalibrated",
        "--epsilon",
        "8",
        "--ledger",
        str(tmp_path / "ledger"),
        "--out",
        str(tmp_path / "out"),
    ]
    ran = subprocess.run(command, input=LONG.encode(), capture_output=True, check=True)
    shown = (ran.stdout + ran.stderr).decode()
    assert "TruncatedPromptWarning" in shown and "zz" not in shown and "ebra" not in shown
