"""PUBLIC prompts that come with the package, so that a calibration needs no data of one's own to begin with."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from ..errors import ConfigError

_PICTURES = 3000
_TAILS = ("light", "style", "quality", "palette")  # what may follow a picture's subject, behind commas


@dataclass(frozen=True)
class ShippedPrompt:
    """A system prompt. segments: its sentences and lines. held_out: by its id alone, for measurements; never part of a calibration."""

    id: str
    segments: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        return int(self.id[:4], 16) % 8 == 0


def public_prompts(kind: str = "system") -> list[Any]:
    """PUBLIC prompts, CC0, that are shipped with the package: what `dpx.calibrate(host)` is fitted to where it is given none.

    Prompts that resemble your own make a better calibration: add them to these, or take theirs alone.

    Args:
        kind: "system": some 600 system prompts, each a list of its sentences (from awesome-chatgpt-prompts). "picture": 3,000 prompts of
            pictures, each a string, written from lists of words.

    Returns:
        A new list.

    Raises:
        ConfigError: another kind.

    Example:
        >>> public = dpx.public_prompts("picture")
        >>> len(public), public[0].count(",") > 0
        (3000, True)
    """
    if kind == "system":
        return [list(prompt.segments) for prompt in system_prompts() if not prompt.held_out]
    if kind == "picture":
        return list(_picture_prompts())
    raise ConfigError(f'The prompts that are shipped are of kind "system" or "picture", got {kind!r}.')


def system_prompts() -> list[ShippedPrompt]:
    """All of them, those that are held out too, in the file's order."""
    read = (json.loads(line) for line in _text("system_prompts.jsonl").splitlines())
    return [ShippedPrompt(entry["id"], tuple(entry["segments"])) for entry in read]


def _text(name: str) -> str:
    return (files(__package__) / "shipped" / name).read_text(encoding="utf-8")


@cache
def _picture_prompts() -> tuple[str, ...]:
    """Distinct ones, the same on every machine."""
    words: dict[str, list[str]] = json.loads(_text("picture_words.json"))
    draw = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < _PICTURES:
        look, subject = draw.choice(words["look"]), draw.choice(words["subject"])
        article = "an" if look[0] in "aeiou" else "a"
        thing = f"{article} {look} {subject}"
        place = f" {draw.choice(words['place'])}" if draw.random() < 0.6 else ""
        medium = f"{draw.choice(words['medium'])} " if draw.random() < 0.5 else ""
        tails = [draw.choice(words[kind]) for kind in draw.sample(_TAILS, draw.randint(1, 3))]
        prompts[", ".join([f"{medium}{thing}{place}", *tails])] = None
    return tuple(prompts)
