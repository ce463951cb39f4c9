"""That a real release is what its law says: its random bytes are recorded, and the law makes the same release of them, bit for bit.

No statistics, so no false alarm: a release that adds other noise than its parameters say, adds it in another place or not at all,
or reads its rows in another way, is not rebuilt. The bytes are the operating system's; they belong to releases of canaries.
"""

from __future__ import annotations

import torch

from ..errors import DPXAttnError
from ..mechanisms.base import Content, perturb
from ..mechanisms.context_rows import ContextRows
from ..mechanisms.inputs import count_units
from ..privacy.bits import SystemEntropy
from .laws import Context, Law


class Recorder:
    """The operating system's entropy, and a record of it."""

    def __init__(self) -> None:
        self._source, self.bytes = SystemEntropy(), bytearray()

    @property
    def private(self) -> bool:
        return True

    def random_bytes(self, n: int) -> bytes:
        data = self._source.random_bytes(n)
        self.bytes += data
        return data


class Replayer:
    """A record, read once from its beginning; more than there is raises."""

    def __init__(self, record: bytes) -> None:
        self._record, self._at = record, 0

    @property
    def private(self) -> bool:
        return False

    @property
    def left(self) -> int:
        return len(self._record) - self._at

    def random_bytes(self, n: int) -> bytes:
        if n > self.left:
            raise _Differs
        self._at += n
        return self._record[self._at - n : self._at]


class _Differs(DPXAttnError):
    """More bytes are read than the release drew."""


def replayed(law: Law, context: Context) -> bool:
    """Whether ONE real release of a canary is rebuilt exactly."""
    prepared, recorder = law.prepared, Recorder()
    real = _tensors(prepared.run(context.rows, groups=context.groups, entropy=recorder).content)
    rows = prepared.count(context.rows, context.groups)
    state = prepared.state(rows, count_units(prepared.config.unit, rows, context.groups))
    replayer = Replayer(bytes(recorder.bytes))
    try:
        noised = perturb(prepared.exact(context.rows, context.groups), prepared.parts, replayer)
        rebuilt = _tensors(prepared.decode(noised, state))
    except _Differs:
        return False
    same = len(real) == len(rebuilt) and all(_equal(a, b) for a, b in zip(real, rebuilt, strict=True))
    return same and replayer.left == 0


def _equal(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return isinstance(a, str) and a == b


def _tensors(content: Content) -> list[torch.Tensor | str]:
    """All numbers of a release, or all texts."""
    if isinstance(content, ContextRows):
        return [content.rows, content.log_weights]
    return [t for c in content for t in ([c] if isinstance(c, str) else c.tensors().values())]
