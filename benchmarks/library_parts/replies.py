"""How far a chat model's replies are from those under the private system prompt, when it reads something else in its place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

QUESTIONS = {
    "about the role": (
        "Hello! Please introduce yourself, and tell me what you will do for me.",
        "Can you help me with this? Please give me an example.",
    ),
    "about anything": (
        "What is the capital of France?",
        "How can I learn something new every day?",
    ),
}
TOKENS = 24


class Replies:
    """A chat model that is read from a GGUF file or a folder, and its greedy replies."""

    def __init__(self, path: Path) -> None:
        given = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if given else path
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **given)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, **given, dtype=torch.float32).eval()

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.int64)

    @torch.no_grad()
    def head(self, system: str | None) -> DynamicCache:
        """What the model keeps of a system prompt (ChatML); None: of none at all, not even the template's own."""
        cache = DynamicCache(config=self.model.config)
        if system is not None:
            ids = self.ids(f"<|im_start|>system\n{system}<|im_end|>\n")
            self.model(ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def question(self, question: str) -> torch.Tensor:
        return self.ids(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")

    @torch.no_grad()
    def reply(self, head: DynamicCache, question: str) -> list[int]:
        """The greedy reply, TOKENS tokens or up to the end."""
        cache, ids, found = copy.deepcopy(head), self.question(question), []
        while len(found) < TOKENS:
            logits = self.model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]
            found.append(int(logits.argmax()))
            if found[-1] == self.tokenizer.eos_token_id:
                break
            ids = torch.tensor([found[-1:]])
        return found

    @torch.no_grad()
    def log_probabilities(self, head: DynamicCache, question: str, reply: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary]: of each next token along a reply."""
        ids = torch.cat([self.question(question), torch.tensor([list(reply[:-1])], dtype=torch.int64)], dim=1)
        out = self.model(ids, past_key_values=copy.deepcopy(head), logits_to_keep=len(reply))
        return torch.log_softmax(out.logits[0].float(), dim=-1)


def divergence(exact: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Mean KL(exact || other) over tokens, and the share of tokens whose first choice is the same."""
    kl = (exact.exp() * (exact - other)).sum(-1)
    return float(kl.mean()), float((exact.argmax(-1) == other.argmax(-1)).float().mean())
