"""The chat model behind a private system prompt: loading, protecting, and one interface for honest users and attackers.

A `Conversation` is what stands after the system prompt, all of it public. A `Responder` answers conversations and says how likely it
holds an ending; attacks and evaluation see the model through it only, protected or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import hf_dp_xattn as dpx
from chat.language import SystemPrompt, Turn
from chat.parts import BUCKET, MODEL, head_ids

DELTA = 1e-5
UNITS = ("group", "row")
CALIBRATIONS = Path(__file__).parent / "calibrations"
EXACT = float("inf")


@dataclass(frozen=True)
class Conversation:
    """Earlier turns, the question, and how the reply is made to begin."""

    question: str
    earlier: tuple[Turn, ...] = ()
    begin: str = ""

    def text(self) -> str:
        turns = "".join(f"<|user|> {q} <|assistant|> {a} </s> " for q, a in self.earlier)
        return f"{turns}<|user|> {self.question} <|assistant|> {self.begin}".rstrip()


class Responder(Protocol):
    def reply(
        self, conversations: Sequence[Conversation], *, new_tokens: int = 20, sample: bool = False
    ) -> list[str]:
        """The reply to each, without its beginning that was given; greedy, or sampled at temperature 1."""
        ...

    def log_likelihood(self, conversation: Conversation, endings: Sequence[str]) -> Tensor:
        """[m] log-probability that the reply goes on with each ending; endings of equally many words."""
        ...


def load_model(path: Path = MODEL) -> tuple[Any, Any]:
    """The chat model in float32, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def config(epsilon: float, unit: str = "group") -> dpx.DPXAttnConfig:
    """epsilon = inf gives exact attention (not private)."""
    base = dpx.DPXAttnConfig(mechanism="anchors", delta=DELTA, unit=unit)
    return base.replace(mechanism="none") if epsilon == EXACT else base.replace(epsilon=float(epsilon))


def segment_ids(prompt: SystemPrompt, tokenizer: Any) -> list[list[int]]:
    return [tokenizer(s, add_special_tokens=False)["input_ids"] for s in prompt.segments]


class PromptResponder:
    """A protected model with one released system prompt; every segment was encoded apart from the others, for each unit."""

    def __init__(self, model: Any, tokenizer: Any, release: Any) -> None:
        self._model, self._tokenizer, self._release = model, tokenizer, release

    @classmethod
    def of(cls, protected: Any, tokenizer: Any, prompt: SystemPrompt) -> PromptResponder:
        release = protected.release(
            segment_ids(prompt, tokenizer),
            groups="segments",
            public_head=head_ids(tokenizer),
            prefix_bucket=BUCKET,
        )
        return cls(protected.model, tokenizer, release)

    def _inputs(self, texts: list[str]) -> dict[str, Any]:
        batch = self._tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        inputs: dict[str, Any] = self._release.inputs(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        )
        return inputs

    @torch.no_grad()
    def reply(
        self, conversations: Sequence[Conversation], *, new_tokens: int = 20, sample: bool = False
    ) -> list[str]:
        inputs = self._inputs([c.text() for c in conversations])
        start = inputs["input_ids"].shape[1]
        drawn = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
        ids = self._model.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=0, **drawn)
        texts: list[str] = self._tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return texts

    @torch.no_grad()
    def log_likelihood(self, conversation: Conversation, endings: Sequence[str]) -> Tensor:
        inputs = self._inputs([f"{conversation.text()} {e}" for e in endings])
        ids = inputs["input_ids"]
        count = len(self._tokenizer(endings[0], add_special_tokens=False)["input_ids"])
        logits = self._model(**inputs, use_cache=True).logits[:, -count - 1 : -1]
        found: Tensor = logits.log_softmax(-1).gather(-1, ids[:, -count:].unsqueeze(-1))
        return found.squeeze(-1).sum(1)
