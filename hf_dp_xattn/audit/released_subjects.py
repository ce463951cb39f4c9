"""Hosts that read released text as subjects: pipelines of pictures, decoder-only and encoder-decoder models. Canaries are strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import ConfigError
from . import canaries
from .picture_subjects import PipelineSubject
from .subject import Canary, Outputs, Subject
from .text_subjects import DecoderSubject, Seq2SeqSubject


class ReleasedText(Subject):
    """What they share: no layer is patched, so that none is lost; and strings go in.

    joint: between the units of a text.
    """

    joint = "\n"
    layered = False

    def release(self, canary: Canary, **options: Any) -> Any:
        given = list(canary) if self.by_groups else self.joint.join(canary)
        return self.handle.release(given, **({"groups": "segments"} if self.by_groups else {}), **options)

    def direct(self, canary: Canary) -> Outputs | None:
        return None

    def _of_texts(self, texts: Sequence[str]) -> list[Any]:
        return list(texts)

    def _parts(self, count: int) -> list[Any]:
        return list(canaries.texts(self._words, count))

    @property
    def _words(self) -> Any:
        """The tokenizer whose words canaries are made of."""
        if self.tokenizer is None:
            raise ConfigError("Released text needs the tokenizer of the model: pass tokenizer=...")
        return self.tokenizer

    def lose(self, name: str) -> Callable[[], None]:
        raise NotImplementedError


class ReleasedPipeline(ReleasedText, PipelineSubject):
    """A pipeline of pictures with a UNet, whose prompt is released text."""

    kind = "pipeline, released text"
    joint = ", "

    @property
    def _words(self) -> Any:
        return self.host.tokenizer

    @torch.no_grad()
    def refused(self) -> None:
        ids = self.host.tokenizer("a", return_tensors="pt").input_ids
        self.host.text_encoder(ids.to(self.host.text_encoder.device))


class ReleasedDecoder(ReleasedText, DecoderSubject):
    """A decoder-only model, before whose question released text stands."""

    kind = "decoder-only, released text"

    def inputs(self, release: Any) -> dict[str, Any]:
        head, question = self.public()
        return dict(release.inputs(input_ids=question.to(self.host.device), public_head=head))

    def given(self, canary: Canary) -> dict[str, Any]:
        return super().given((torch.tensor(self._encode(self.joint.join(canary))),))


class ReleasedSeq2Seq(ReleasedText, Seq2SeqSubject):
    """An encoder-decoder model that reads released text."""

    kind = "encoder-decoder, released text"

    def given(self, canary: Canary) -> dict[str, Any]:
        return super().given((torch.tensor(self._encode(self.joint.join(canary))),))

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        return self.given(canary)

    def refused(self) -> None:
        self.host.generate(**self.given(self.canaries(1)[0]), max_new_tokens=1)


def released_subject(host: Any) -> type[ReleasedText]:
    """Raises ConfigError where a host is none that an audit, a benchmark or a demonstration tries."""
    if hasattr(host, "unet"):
        return ReleasedPipeline
    config = getattr(host, "config", None)
    if config is None or not hasattr(host, "generate"):
        raise ConfigError(
            "Of hosts that read released text those are tried that have a UNet, or generate text: of any other, what leaves is the text "
            "that protected.report() shows, and the law of its release is the library's (docs/library.md)."
        )
    return ReleasedSeq2Seq if config.is_encoder_decoder else ReleasedDecoder
