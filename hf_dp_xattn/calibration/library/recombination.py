"""New texts of public ones: words that stand in the same public texts take each other's place.

Public phrases seldom hold every combination. A *frame* is a text with one word taken out; two words that fill the same frames ("a small _
circle": red, blue) are exchangeable where they share at least `_SHARED` frames and a fair part of the rarer one's frames. The library is
closed under such exchanges, nearest texts first, up to a limit. Nothing but public texts is read, and no grammar is known: what comes
out may be odd, which costs nothing but room.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import combinations

_SHARED = 2
_FAIR = 0.1  # of the frames of the rarer word that others fill as well
_LONGEST = 24  # words of a text that takes part
_FILLERS = 256  # words of one frame that are compared

Words = tuple[str, ...]


def exchangeable(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Each word's exchangeable ones, those with the most shared frames first."""
    frames: dict[Words, dict[str, None]] = defaultdict(dict)
    for text in texts:
        words = tuple(text.split())
        for i, word in enumerate(words if 1 < len(words) <= _LONGEST else ()):
            frames[(*words[:i], "", *words[i + 1 :])][word] = None
    shared: dict[tuple[str, str], int] = defaultdict(int)
    used: dict[str, int] = defaultdict(int)
    for fillers in frames.values():
        if len(fillers) > 1:
            for word in fillers:
                used[word] += 1
            for pair in combinations(sorted(fillers)[:_FILLERS], 2):
                shared[pair] += 1
    pairs: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for (a, b), count in shared.items():
        if count >= max(_SHARED, _FAIR * min(used[a], used[b])):
            pairs[a].append((-count, b))
            pairs[b].append((-count, a))
    return {word: tuple(other for _, other in sorted(others)) for word, others in pairs.items()}


def recombined(texts: Sequence[str], limit: int) -> dict[str, str]:
    """New texts, each with the public text that it comes of: those one exchange away first, then those two away, and so on.

    Args:
        texts: public, distinct. limit: the largest number of new texts.
    """
    others = exchangeable(texts)
    root: dict[str, str] = {text: text for text in texts}
    waiting = deque(texts)
    roots: dict[str, str] = {}
    while waiting and len(roots) < limit:
        text = waiting.popleft()
        words = text.split()
        if not 1 < len(words) <= _LONGEST:
            continue
        for i, word in enumerate(words):
            for other in others.get(word, ()):
                new = " ".join((*words[:i], other, *words[i + 1 :]))
                if new not in root and len(roots) < limit:
                    root[new] = roots[new] = root[text]
                    waiting.append(new)
    return roots
