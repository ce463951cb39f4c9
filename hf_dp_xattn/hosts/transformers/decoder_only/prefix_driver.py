"""Decoder-only models, used from plain texts: a private prefix, and a public question behind it."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch

from ....errors import ConfigError, ContextError
from ... import canaries
from ...driver import LENGTH, NOTHING, Canary
from ..model_driver import IDS, PICTURES, ModelDriver, public_words
from ..model_texts import PrefixText, chat_head, plain_head, read_prefix, read_question, without_system
from .prefix_attention import check_window
from .prefix_contexts import padded_length

_NEAR = 0.05  # of a row's length: rounding of another type or device is far less, another token far more


class PrefixDriver(ModelDriver):
    """A decoder-only model; contexts are private prefixes, and a public question follows."""

    kind = "decoder-only"
    foreign: ClassVar = {**PICTURES, "{first} is for encoder-decoder models.": ("begin",)}
    asks = True

    # ---- texts of the command line -----------------------------------------------------------------------------------------

    @property
    def _chat(self) -> bool:
        return bool(self.options.chat)

    def public_contexts(self, texts: list[Any], questions: list[str] | None) -> tuple[Any, dict[str, Any]]:
        if self.options.length is not None:
            raise ConfigError(LENGTH)
        prefixes = [read_prefix(self.tokenizer, text, chat=self._chat) for text in texts]
        more: dict[str, Any] = {
            "public_head": prefixes[0].head,
            "prefix_bucket": self.options.prefix_bucket,
        }
        if questions is not None:
            more["questions"] = [read_question(self.tokenizer, q, chat=self._chat)[0] for q in questions]
        return [p.context for p in prefixes], more

    def _prefix(self, text: str) -> PrefixText:
        return read_prefix(self.tokenizer, self.lines(text) if self.by_groups else text, chat=self._chat)

    def release_text(self, text: str) -> Any:
        prefix = self._prefix(text)
        return self.handle.release(
            prefix.context,
            groups="segments" if self.by_groups else None,
            public_head=prefix.head,
            prefix_bucket=self.options.prefix_bucket,
            text=text,
        )

    def prepare(self, release: Any | None, private: str | None) -> None:
        if self.options.public is None:
            raise ConfigError("A decoder-only model answers something: --public TEXT is the user's turn.")
        ids = public_words(read_question(self.tokenizer, self.options.public, chat=self._chat))
        self.public, self.skip = {"input_ids": ids}, ids.shape[1]
        if private is not None:  # with a saved release `generate` itself says so, at no cost
            self._check_room(private)
        if release is not None:
            self._check_chat(release)

    def draw_plain(self, text: str | None) -> list[Any]:
        if text is None:
            ids = without_system(self.tokenizer, self.options.public, chat=self._chat)
        else:
            prefix = read_prefix(self.tokenizer, text, chat=self._chat)
            assert isinstance(prefix.context, torch.Tensor)
            ids = torch.cat([prefix.head, prefix.context, self.public["input_ids"][0]])
        whole = ids.unsqueeze(0)
        return self._plain_texts({"input_ids": whole, "attention_mask": torch.ones_like(whole)}, len(ids))

    def _check_room(self, private: str) -> None:
        """Raises ConfigError where the model has too few positions for the text."""
        prefix = self._prefix(private)
        parts = prefix.context if isinstance(prefix.context, list) else [prefix.context]
        slots = padded_length(max(map(len, parts), default=0), self.options.prefix_bucket)
        try:
            check_window(self.handle.host.limit, len(prefix.head) + slots + self.skip + self.longest - 1)
        except ConfigError as error:
            raise ConfigError(f"{error} {NOTHING}") from None

    def _check_chat(self, release: Any) -> None:
        """Compares --chat with what a saved release begins with: the chat template's first words, or BOS alone. A note where that cannot
        be told.

        Raises:
            ConfigError: it was made the other way. What follows it would be garbage.
        """
        try:
            template = chat_head(self.tokenizer)
        except (ConfigError, ContextError):
            if self._chat:
                raise
            return  # no template, or none that a release could have been made with
        as_chat = self._begins(release, template)
        as_plain = self._begins(release, plain_head(self.tokenizer))
        if as_chat and not as_plain and not self._chat:
            raise ConfigError(
                f"This release was made with --chat: it begins with the chat template's words. Give --chat here too. {NOTHING}"
            )
        if as_plain and not as_chat and self._chat:
            raise ConfigError(
                f"This release was made without --chat: the chat template's words are not before it. Leave out --chat. {NOTHING}"
            )
        if self._chat and not as_chat:
            self.notes.append(
                "the public words before this release are not those that the chat template gives now; it may be made for other words."
            )
        elif as_chat == as_plain and not self._chat and self.tokenizer.chat_template:
            self.notes.append(
                "the tokenizer has a chat template; if the release was made with --chat, give --chat here too."
            )

    def _begins(self, release: Any, head: torch.Tensor) -> bool:
        """Whether the release stands behind these PUBLIC ids [h]: by how many rows it has before it, and by what they are."""
        kept = [c.public_rows for c in release.contexts]
        if any(len(rows) != len(head) for rows in kept):
            return False
        if not len(head):
            return True
        want = self.handle.host.encoder.run(head).float().cpu()
        lengths = want.norm(dim=1)
        return all(bool(((rows.float().cpu() - want).norm(dim=1) <= _NEAR * lengths).all()) for rows in kept)

    # ---- canaries ----------------------------------------------------------------------------------------------------------

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @functools.cached_property
    def beside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(head [h], question [1, m]): public ids before and after a canary."""
        if self.tokenizer is None:
            ids = canaries.random_ids(self.host, 1, IDS, seed=1)[0]
            return ids[:1], ids[1:].unsqueeze(0)
        question = canaries.texts(self.tokenizer, 1, seed=1)[0]
        if getattr(self.tokenizer, "chat_template", None):
            return chat_head(self.tokenizer), read_question(self.tokenizer, question, chat=True)
        return plain_head(self.tokenizer), read_question(self.tokenizer, question, chat=False)

    def release(self, canary: Canary, **options: Any) -> Any:
        context: Any = [p.tolist() for p in canary] if self.by_groups else torch.cat(canary)
        groups = {"groups": "segments"} if self.by_groups else {}
        return self.handle.release(context, public_head=self.beside[0], **groups, **options)

    def is_blank(self, inputs: dict[str, Any]) -> bool:
        cache = inputs["past_key_values"]
        return all(layer.keys is None or layer.keys.numel() == 0 for layer in cache.layers)

    def release_alone(self, canary: Canary) -> bool:
        tokens = [[token] for token in torch.cat(canary).unique().tolist()]
        self.handle.release(tokens, groups="segments", public_head=self.beside[0])
        return True

    def inputs(self, release: Any) -> dict[str, Any]:
        return dict(release.inputs(input_ids=self.beside[1].to(self.host.device)))

    def call_inputs(self, canary: Canary) -> dict[str, Any]:
        head, question = self.beside
        ids = torch.cat([head, *canary, question[0]]).unsqueeze(0).to(self.host.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def refused(self) -> None:
        self.host(input_ids=self.beside[1].to(self.host.device))
