"""Which surface a host has; and that a host of an unseen kind is served by one class and one entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import pytest
import torch
from transformers import TextGenerationPipeline, pipeline

import hf_dp_xattn as dpx
from hf_dp_xattn.errors import ConfigError, ProtectionLostError, UnsupportedModelError
from hf_dp_xattn.hosts.calibrate import shipped_contexts
from hf_dp_xattn.hosts.guard import mark, unmark
from hf_dp_xattn.hosts.saving import SaveShadow
from hf_dp_xattn.hosts.text import surfaces
from hf_dp_xattn.hosts.text.chat_swap import ChatSwap
from hf_dp_xattn.hosts.text.generate_gate import GenerateGate
from hf_dp_xattn.hosts.text.prompt_swap import PromptSwap
from hf_dp_xattn.hosts.text.released_texts import ReleasedText
from hf_dp_xattn.hosts.text.surfaces import surface_of

from ...hosts_tiny import tiny_sd, tiny_sdxl
from ..transformers.decoder_only import tiny as decoder
from ..transformers.encoder_decoder import tiny as seq2seq
from .libraries import LINES, config, library
from .words import tokenizer


class Printer:
    """A host of no library."""

    def __init__(self) -> None:
        self.printed: list[str] = []

    def print(self, text: str) -> None:
        self.printed.append(text)


class PrinterSurface:
    """`print` is called with released text."""

    each, apart = False, False

    def __init__(self, host: Printer, guard: Any) -> None:
        self.host = self.model = host
        self.saving = SaveShadow(host, guard)
        self._guard = guard

    @classmethod
    def matches(cls, host: Any) -> bool:
        return isinstance(host, Printer)

    @classmethod
    def parts(cls, host: Any) -> Sequence[Any]:
        return ()

    @classmethod
    def around(cls, host: Any, namer: Any, guard: Any, tokenizer: Any) -> Self:
        return cls(host, guard)

    def install(self, handle: Any) -> None:
        original, host = self.host.print, self.host
        self._handle = handle
        self._call = lambda text: original(str(handle.release(text).text))
        host.print = self._call  # type: ignore[method-assign]
        mark(host, handle)

    def remove(self) -> None:
        vars(self.host).pop("print", None)
        unmark(self.host, self._handle)

    def lost(self) -> str | None:
        return None if vars(self.host).get("print") is self._call else "`print` was replaced"

    def read_ids(self, context: Any) -> None:
        return None

    def ids_of(self, units: Sequence[str], whole: str) -> list[Any]:
        return []

    def inputs(self, texts: Sequence[tuple[ReleasedText, str | None]], **public: Any) -> dict[str, Any]:
        return {"text": str(texts[0][0])}


def codes(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[len(t), sum(map(ord, t)) % 7, 1.0] for t in texts])


def test_the_surface_of_each_host() -> None:
    words, model = tokenizer(), decoder.tiny("llama")
    for pipe in (tiny_sd(), tiny_sdxl()):
        assert surface_of(pipe) is PromptSwap and PromptSwap.parts(pipe)
    assert surface_of(TextGenerationPipeline(model=model, tokenizer=words)) is ChatSwap
    assert surface_of(model) is surface_of(seq2seq.tiny("t5")) is GenerateGate
    classify = pipeline("token-classification", model=model, tokenizer=words)
    assert surface_of(classify) is surface_of(object()) is surface_of(None) is None


def test_another_surface_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Printer()
    made = library(None, LINES, encoder=codes, grouping="lines")
    with pytest.raises(UnsupportedModelError, match="Printer cannot be protected"):
        dpx.protect(host, config(), calibration=made, encoder=codes)
    monkeypatch.setattr(surfaces, "SURFACES", (*surfaces.SURFACES, PrinterSurface))
    with dpx.protect(host, config(), calibration=made, encoder=codes) as protected:
        host.print("a secret\nanother")
        assert host.printed[0].split("\n") == list(protected.release("a secret\nanother").text)
        assert set(host.printed[0].split("\n")) <= set(LINES)
        assert protected.release("a secret\nanother").inputs() == {"text": host.printed[0]}
        assert [entry["charges"] for entry in protected.report().releases] == [1]
        host.print = print  # type: ignore[method-assign]
        with pytest.raises(ProtectionLostError, match="`print` was replaced"):
            protected.release("a secret")
    assert "_dp_xattn_handle" not in vars(host)
    host.print("plain")
    assert host.printed[1:] == ["plain"]


def test_the_public_prompts_for_a_host() -> None:
    pictures, systems = dpx.public_prompts("picture"), dpx.public_prompts()
    assert shipped_contexts(tiny_sd()) == shipped_contexts(tiny_sdxl()) == pictures
    model = decoder.tiny("llama")
    chats = TextGenerationPipeline(model=model, tokenizer=tokenizer())
    assert shipped_contexts(None) == shipped_contexts(model) == shipped_contexts(chats) == systems
    with pytest.raises(ConfigError, match="public documents like yours"):
        shipped_contexts(seq2seq.tiny("t5"))
