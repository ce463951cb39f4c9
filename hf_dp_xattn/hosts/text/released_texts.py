"""What was released as text: public texts, one for each unit, and the text that they make together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ...report import Guarantee


class ReleasedText(tuple[str, ...]):
    """The released texts of one context: one for each unit, or, of votes, each text once and the most frequent first. Public.

    `str()` gives them as one text, joined as units are cut. counts: how often each stands in the list (of answers: 1 each).
    """

    joint: str
    counts: tuple[int, ...]

    def __new__(
        cls, texts: Iterable[str], joint: str = "\n", counts: Iterable[int] | None = None
    ) -> ReleasedText:
        text = super().__new__(cls, texts)
        text.joint = joint
        text.counts = (1,) * len(text) if counts is None else tuple(counts)
        return text

    @classmethod
    def counted(cls, texts: Iterable[str], joint: str) -> ReleasedText:
        """Of a list in which texts repeat."""
        counts = Counter(texts)
        return cls(counts, joint, counts.values())

    def __str__(self) -> str:
        return self.joint.join(self)

    def shown(self) -> dict[str, list[str] | list[int]]:
        """For reports and files; counts only where there are such."""
        counted = any(n != 1 for n in self.counts)
        return {"text": list(self), **({"counts": list(self.counts)} if counted else {})}


class ReleasedPrompt(str):
    """A text that `release.inputs` gave: public, and passed on as it is. Any other string is private to a protected pipeline."""

    __slots__ = ()


@dataclass(frozen=True)
class ReleasedTexts:
    """One context's release. No layer reads it: whatever the host's weights become, it serves."""

    text: ReleasedText
    guarantee: Guarantee


class Shelf:
    """Releases by the ledger's names of their contexts, as long as the handle is active (`releases.Lookup`)."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], ReleasedTexts] = {}

    def find(self, keys: Iterable[tuple[str, str]]) -> ReleasedTexts | None:
        return next((self._known[key] for key in keys if key in self._known), None)

    def holds(self, keys: Iterable[tuple[str, str]]) -> bool:
        return self.find(keys) is not None

    def put(self, key: tuple[str, str], released: ReleasedTexts) -> None:
        self._known[key] = released

    def clear(self) -> None:
        self._known.clear()
