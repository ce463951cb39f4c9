"""The subject of a host: one class per kind of host."""

from __future__ import annotations

from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from .picture_subjects import PipelineSubject, UNetSubject
from .released_subjects import released_subject
from .subject import Canary, Outputs, Subject
from .text_subjects import DecoderSubject, ImageTextSubject, Seq2SeqSubject, TransformersSubject

__all__ = [
    "Canary",
    "DecoderSubject",
    "ImageTextSubject",
    "Outputs",
    "PipelineSubject",
    "Seq2SeqSubject",
    "Subject",
    "TransformersSubject",
    "UNetSubject",
    "subject_of",
]


# of diffusers there are two: of a pipeline, and of a bare UNet
SUBJECTS: dict[str, type[Subject]] = {
    "encoder-decoder": Seq2SeqSubject,
    "image-text": ImageTextSubject,
    "decoder-only": DecoderSubject,
}


def subject_of(host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None) -> Subject:
    """The subject for a host that is not protected.

    Raises:
        UnsupportedModelError: see `protect`. ConfigError: it is protected already.
    """
    from ..hosts.accounts import STAYS
    from ..hosts.host_registry import kind_of
    from ..hosts.protect import handle_of

    if handle_of(host) is not None:
        raise ConfigError(
            "This host is protected: call dpx.unprotect(host) first. It is protected here with a ledger of its own, and left "
            f"unprotected ({STAYS})."
        )
    if KNOWN[config.mechanism].releases == "texts":
        return released_subject(host)(host, config, calibration, tokenizer)
    kind = kind_of(host)
    subject = SUBJECTS.get(kind.family)
    if subject is None:
        subject = UNetSubject if kind.pipeline(host) is None else PipelineSubject
    return subject(host, config, calibration, tokenizer)
