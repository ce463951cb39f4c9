"""The subject of a host: one class per kind of host."""

from __future__ import annotations

from typing import Any

from ..config import DPXAttnConfig
from ..errors import ConfigError
from .picture_subjects import PipelineSubject, UNetSubject
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


def subject_of(host: Any, config: DPXAttnConfig, calibration: Any = None, tokenizer: Any = None) -> Subject:
    """The subject for a host that is not protected.

    Raises:
        UnsupportedModelError: see `protect`. ConfigError: it is protected already.
    """
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    from ..hosts.accounts import STAYS
    from ..hosts.diffusers.architectures import refuse_host
    from ..hosts.protect import handle_of
    from ..hosts.transformers.decoder_only.prefix_probing import is_decoder_only
    from ..hosts.transformers.encoder_decoder.cross_probing import is_seq2seq
    from ..hosts.transformers.mllama.mllama_probing import is_image_text

    if handle_of(host) is not None:
        raise ConfigError(
            "This host is protected: call dpx.unprotect(host) first. It is protected here with a ledger of its own, and left "
            f"unprotected ({STAYS})."
        )
    if isinstance(host, DiffusionPipeline):
        kind: type[Subject] = PipelineSubject
    elif isinstance(host, UNet2DConditionModel):
        kind = UNetSubject
    elif is_seq2seq(host):
        kind = Seq2SeqSubject
    elif is_image_text(host):
        kind = ImageTextSubject
    elif is_decoder_only(host):
        kind = DecoderSubject
    else:
        raise refuse_host(host)
    return kind(host, config, calibration, tokenizer)
