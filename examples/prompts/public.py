"""The prompts of `system_prompts.jsonl`, split by id: seven eighths are public, one is held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("system_prompts.jsonl")


@dataclass(frozen=True)
class Prompt:
    """segments: its sentences and lines. held_out: by its id alone, so that a longer file moves none from one part to the other."""

    id: str
    segments: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return int(self.id[:4], 16) % 8 == 0


def prompts(*, held_out: bool) -> list[Prompt]:
    """All prompts of one part, in the file's order."""
    read = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    found = [Prompt(entry["id"], tuple(entry["segments"])) for entry in read]
    return [p for p in found if p.held_out is held_out]
