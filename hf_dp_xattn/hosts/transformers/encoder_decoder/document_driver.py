"""Encoder-decoder models, used from plain texts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from ....errors import ConfigError
from ...driver import DECODERS, LENGTH, NOTHING, Canary, Outputs
from ..model_driver import PICTURES, ModelDriver, public_words
from ..model_texts import plain_ids, read_documents, tokenize
from .public_documents import starts_of


class DocumentDriver(ModelDriver):
    """An encoder-decoder model; contexts are documents, or what else its encoder takes."""

    kind = "encoder-decoder"
    foreign: ClassVar = {"{first} is for decoder-only models.": ("chat", "prefix_bucket"), **PICTURES}

    @property
    def serving(self) -> torch.nn.Module:
        joined = getattr(self.host, "decoder", None)  # EncoderDecoderModel
        decoder: torch.nn.Module = self.host.get_decoder() if joined is None else joined
        return decoder

    # ---- texts of the command line -----------------------------------------------------------------------------------------

    def public_contexts(self, texts: list[Any], questions: list[str] | None) -> tuple[Any, dict[str, Any]]:
        options, tokenizer = self.options, self.tokenizer
        if options.length is not None and self.by_groups:
            raise ConfigError(LENGTH)
        if options.chat or options.prefix_bucket is not None:
            raise ConfigError(DECODERS)
        more = {} if questions is None else {"questions": [plain_ids(tokenizer, q) for q in questions]}
        if self.by_groups:
            return [read_documents(tokenizer, documents) for documents in texts], more
        if options.length is None:
            raise ConfigError(
                "Public texts of an encoder-decoder model have one length: --length N cuts them to N tokens."
            )
        rows = [tokenizer(text, truncation=True, max_length=options.length).input_ids for text in texts]
        whole = [
            ids for ids in rows if len(ids) == options.length
        ]  # a longer text is cut before its end token
        if not whole:
            raise ConfigError(f"No text has {options.length} tokens; lower --length.")
        if len(whole) < len(rows):
            short = len(rows) - len(whole)
            self.notes.append(f"{short} of {len(rows)} texts are shorter than --length and left out")
        return torch.tensor(whole), more

    def release_text(self, text: str) -> Any:
        documents = read_documents(self.tokenizer, self.lines(text))
        return self.handle.release(documents, groups="documents" if self.by_groups else None, text=text)

    def prepare(self, release: Any | None, private: str | None) -> None:
        self.public, self.skip = {}, 0
        if self.options.public is not None:
            self.public |= self.read_public(public_words(tokenize(self.tokenizer, self.options.public)[0]))
        if self.options.begin is not None:
            start = starts_of(self.host, [plain_ids(self.tokenizer, self.options.begin)])[0]
            self.public["decoder_input_ids"], self.skip = start.unsqueeze(0), len(start)
        check_decoder_room(self.host, max(1, self.skip) + self.longest - 1)

    def read_public(self, ids: torch.Tensor) -> dict[str, Any]:
        """What is given to `release.inputs` of the public words, ids [1, m]."""
        return {"input_ids": ids}

    def draw_plain(self, text: str | None) -> list[Any]:
        if text is None:
            return []
        begin = {name: ids for name, ids in self.public.items() if name == "decoder_input_ids"}
        return self._plain_texts({**read_documents(self.tokenizer, [text]), **begin}, self.skip)

    # ---- canaries ----------------------------------------------------------------------------------------------------------

    @property
    def _reads_text(self) -> bool:
        return bool(self.host.main_input_name == "input_ids")

    def _parts(self, count: int) -> list[Any]:
        if self._reads_text:
            return super()._parts(count)
        raise ConfigError(
            f"This model reads {self.host.main_input_name}: give two contexts of your own, contexts=[...], as mappings of encoder inputs."
        )

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        if isinstance(canary[0], dict):
            return dict(canary[0])
        longest = max(map(len, canary))
        pad = getattr(self.host.config, "pad_token_id", None) or 0
        ids = torch.full((len(canary), longest), pad)
        mask = torch.zeros_like(ids)
        for i, part in enumerate(canary):
            ids[i, : len(part)], mask[i, : len(part)] = part, 1
        device = self.host.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

    def unprotected(self, canary: Canary) -> dict[str, Any]:
        return self.call_inputs(canary if isinstance(canary[0], dict) else (torch.cat(canary),))

    def release(self, canary: Canary, **options: Any) -> Any:
        groups = {"groups": "documents"} if self.by_groups else {}
        return self.handle.release(**self.call_inputs(canary), **groups, **options)

    def direct(self, canary: Canary) -> Outputs | None:
        return None if self.by_groups else self.answer(self.call_inputs(canary))

    def plain(self, canary: Canary) -> Outputs:
        return self.answer(
            self.call_inputs(canary[-1:])
        )  # documents that are encoded apart have no unprotected counterpart

    def refused(self) -> None:
        rows = torch.zeros(1, 4, self.handle.host.channels, dtype=self.host.dtype, device=self.host.device)
        start = torch.tensor([[self.host.config.decoder_start_token_id or 0]], device=self.host.device)
        self.host(encoder_outputs=BaseModelOutput(last_hidden_state=rows), decoder_input_ids=start)


def check_decoder_room(model: Any, tokens: int) -> None:
    """Raises ConfigError where an encoder-decoder model's decoder has fewer positions than `tokens`, of its start and its text."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for name, module in decoder.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("position" in last or last == "wpe"):
            places = module.num_embeddings - int(getattr(module, "offset", 0))
            if tokens > places:
                raise ConfigError(
                    f"The decoder has {places} positions, and --begin and --new-tokens need {tokens}: ask for fewer. {NOTHING}"
                )
