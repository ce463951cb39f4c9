"""What Whisper's `generate` makes of a recording's length, which a placeholder does not have: it cuts the recording into segments by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....errors import ConfigError
from ..generating import refuse_arguments

_SEGMENTS = (
    "it reads the length of the recording, which a release does not have. Cut the recording into pieces of at most the model's window (30 "
    "seconds) and transcribe each by itself, without timestamps"
)
_FALLBACK = "a transcript is decoded once: a second try, or a skipped segment, reads the recording itself"
_REFUSED: dict[str, str] = {
    "return_timestamps": _SEGMENTS,
    "return_segments": _SEGMENTS,
    "monitor_progress": _SEGMENTS,
    "logprob_threshold": _FALLBACK,
    "compression_ratio_threshold": _FALLBACK,
    "no_speech_threshold": _FALLBACK,
}
_HARMLESS: dict[str, tuple[Any, ...]] = {"return_timestamps": (False,), "return_segments": (False,)}


def transcribes(model: Any) -> bool:
    """Whether the model's `generate` is Whisper's."""
    return hasattr(model, "_expand_variables_for_generation")


def refuse_lengths(arguments: Mapping[str, Any], config: Any) -> None:
    """Raises ConfigError for arguments that make Whisper read the length of a recording, or the recording again.

    arguments, config: as for `refuse_arguments`.
    """
    refuse_arguments(arguments, config, _REFUSED, _HARMLESS)
    temperature = arguments.get("temperature")
    if isinstance(temperature, (list, tuple)) and len(temperature) != 1:
        raise ConfigError(f"several temperatures are not supported on a protected model: {_FALLBACK}.")
