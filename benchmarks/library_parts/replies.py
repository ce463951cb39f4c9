"""How far a chat model's replies are from those under the private system prompt, when it reads something else in its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = (
    "Hello! Please introduce yourself, and tell me what you will do for me.",
    "Can you help me with this? Please give me an example.",
)
TOKENS = 24


class Replies:
    """A chat model that is read from a GGUF file or a folder, and its greedy replies."""

    def __init__(self, path: Path) -> None:
        given = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if given else path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **given)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, **given, dtype=torch.float32).eval()

    def ids(self, system: str | None, question: str) -> list[int]:
        """ChatML; None: no system prompt at all, not even the template's own."""
        head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
        text = f"{head}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    @torch.no_grad()
    def reply(self, system: str, question: str) -> list[int]:
        """The greedy reply, at most TOKENS tokens."""
        ids = torch.tensor([self.ids(system, question)])
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
        found: list[int] = out[0, ids.shape[1] :].tolist()
        return found

    @torch.no_grad()
    def log_probabilities(self, system: str | None, question: str, reply: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]: of each next token along a reply."""
        head = self.ids(system, question)
        logits = self.model(torch.tensor([[*head, *reply[:-1]]])).logits[0, len(head) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean KL(exact || other) over tokens, and the share of tokens whose first choice is the same."""
    kl = (exact.exp() * (exact - other)).sum(-1)
    return float(kl.mean()), float((exact.argmax(-1) == other.argmax(-1)).float().mean())
