"""Statements of docs/hosts.md that a new transformers may make untrue."""

from __future__ import annotations

import re
from pathlib import Path

from transformers.pipelines import SUPPORTED_TASKS

PAGE = (Path(__file__).parents[4] / "docs" / "hosts.md").read_text(encoding="utf-8")


def test_the_pipelines_that_it_names_exist() -> None:
    named = set(re.findall(r"`([a-z0-9-]+)`\s+pipeline", PAGE))
    assert named == {"automatic-speech-recognition", "text-generation"} and named <= set(SUPPORTED_TASKS)
    assert not {"text2text-generation", "summarization", "translation"} & set(SUPPORTED_TASKS)


def test_torch_compile_is_not_among_what_is_refused() -> None:
    """It runs with graph breaks (`test_fail_closed.test_compiled_with_graph_breaks`)."""
    refused = [part for part in PAGE.split("\n\n") if part.startswith("What is refused")]
    assert len(refused) == 2 and not any("torch.compile" in part for part in refused)
