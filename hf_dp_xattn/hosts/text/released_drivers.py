"""Hosts that read released text, used from plain texts: pipelines of pictures, decoder-only and encoder-decoder models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from ...errors import ConfigError
from .. import canaries
from ..diffusers.picture_driver import PipelineDriver
from ..driver import Canary, Driver, Outputs, Timed
from ..transformers.decoder_only.prefix_driver import PrefixDriver
from ..transformers.encoder_decoder.document_driver import DocumentDriver
from ..transformers.model_texts import chat_head

_BUCKET = {
    "--prefix-bucket is not for --mechanism library: released text has a length of its own.": (
        "prefix_bucket",
    )
}


class ReleasedTextDriver(Driver):
    """What they share: no layer is patched, so that none is lost; and strings go in."""

    layered = False

    def release_text(self, text: str) -> Any:
        return self.handle.release(text)

    def release(self, canary: Canary, **options: Any) -> Any:
        context = list(canary) if self.by_groups else self.joint.join(canary)
        return self.handle.release(context, **({"groups": "segments"} if self.by_groups else {}), **options)

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


class ReleasedPipeline(ReleasedTextDriver, PipelineDriver):
    """A pipeline of pictures, whose prompt is released text."""

    kind = "pipeline, released text"
    foreign: ClassVar = {**_BUCKET, **PipelineDriver.foreign}

    def check_trial(self) -> None:
        if not hasattr(self.host, "unet"):
            raise ConfigError(
                "Of hosts that read released text those are tried that have a UNet, or generate text: of any other, what leaves is the "
                "text that protected.report() shows, and the law of its release is the library's (docs/library.md)."
            )

    def check_public(self, text: str) -> None:
        return

    def timed(self, latents: int | None, new_tokens: int | None) -> Timed:
        raise ConfigError(
            "A pipeline that reads released text runs as it does on any prompt, so that no step differs; a release takes the encoding of "
            "its phrases. Measure a model of text, or another --mechanism."
        )

    @property
    def _words(self) -> Any:
        return self.host.tokenizer

    @torch.no_grad()
    def refused(self) -> None:
        ids = self.host.tokenizer("a", return_tensors="pt").input_ids
        self.host.text_encoder(ids.to(self.host.text_encoder.device))


class ReleasedPrefix(ReleasedTextDriver, PrefixDriver):
    """A decoder-only model, before whose question released text stands, which is as long as it is."""

    kind = "decoder-only, released text"
    foreign: ClassVar = {**_BUCKET, **PrefixDriver.foreign}

    def prepare(self, release: Any | None, private: str | None) -> None:
        super().prepare(None, None)
        if self._chat:
            self.public["public_head"] = chat_head(self.tokenizer)

    @property
    def _chat(self) -> bool:
        if self.options.chat is None:
            return bool(getattr(self.tokenizer, "chat_template", None))
        return bool(self.options.chat)

    def begins(self, inputs: dict[str, Any]) -> int:
        return int(inputs["input_ids"].shape[1])  # the released text stands before the user's own

    def inputs(self, release: Any) -> dict[str, Any]:
        head, question = self.beside
        return dict(release.inputs(input_ids=question.to(self.host.device), public_head=head))

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        return super().call_inputs((torch.tensor(self._encode(self.joint.join(canary))),))


class ReleasedDocument(ReleasedTextDriver, DocumentDriver):
    """An encoder-decoder model that reads released text."""

    kind = "encoder-decoder, released text"
    foreign: ClassVar = {**_BUCKET, **DocumentDriver.foreign}

    def read_public(self, ids: torch.Tensor) -> dict[str, Any]:
        return {"prompt": self.options.public}

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        return super().call_inputs((torch.tensor(self._encode(self.joint.join(canary))),))

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        return self.call_inputs(canary)

    def refused(self) -> None:
        self.host.generate(**self.call_inputs(self.canaries(1)[0]), max_new_tokens=1)


def released_driver(host: Any) -> type[Driver]:
    """By what the host makes. Raises ConfigError where it makes nothing."""
    if host is None:
        raise ConfigError("There is no host here: what leaves is the text that protected.report() shows.")
    encoder = getattr(getattr(host, "config", None), "is_encoder_decoder", None)
    return ReleasedPipeline if encoder is None else ReleasedDocument if encoder else ReleasedPrefix
