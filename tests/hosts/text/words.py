"""A tokenizer of whole words for tiny language models, with a chat template; no download."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = "please be polite close at five never say the code is open on monday speak like a pirate answer in french red blue secret number"
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] != 'system' %} {% endif %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIAL = ("[pad]", "[bos]", "[eos]", "[unk]", "[system]", "[user]", "[assistant]", "[end]")


def tokenizer(size: int = 40, template: str | None = TEMPLATE) -> Any:
    """Ids below `size`, as the tiny models have; what it does not know is [unk]."""
    vocabulary = {t: i for i, t in enumerate((*SPECIAL, *dict.fromkeys(WORDS.split())))}
    assert len(vocabulary) <= size, len(vocabulary)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[pad]",
        bos_token="[bos]",
        eos_token="[eos]",
        unk_token="[unk]",
        additional_special_tokens=list(SPECIAL[4:]),
    )
    made.chat_template = template
    return made
