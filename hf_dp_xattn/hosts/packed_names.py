"""`PackedNames`: names of a corpus's documents as the ledger knows them, 66 bytes each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from ..privacy.ledger import Name

_WIDTH = 66  # two digests of 32 bytes; whether there is a grouping, and whether the name is a former one; whether it begins a document


class PackedNames(Sequence[Name]):
    """Names of documents, in order.

    Args:
        ledger: by which all of them begin, `Namer.id`.
    """

    def __init__(self, ledger: str, packed: bytearray | None = None) -> None:
        self._ledger, self._packed = ledger, bytearray() if packed is None else packed

    def add(self, document: Iterable[Name]) -> None:
        """The names of one more document, its own first."""
        first = 1
        for name in document:
            grouping = b"" if name.grouping is None else self._bytes(name.grouping)
            flags = (len(grouping) > 0) | name.former << 1
            self._packed += self._bytes(name.digest) + grouping.ljust(32, b"\0") + bytes((flags, first))
            first = 0

    def _bytes(self, digest: str) -> bytes:
        ledger, _, digits = digest.partition("-")
        assert ledger == self._ledger
        return bytes.fromhex(digits)

    def _rows(self) -> np.ndarray:
        return np.frombuffer(self._packed, dtype=np.uint8).reshape(-1, _WIDTH)

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self._rows()[:, -1].sum())

    def __len__(self) -> int:
        return len(self._packed) // _WIDTH

    def __iter__(self) -> Iterator[Name]:
        return (self._name(i) for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Name: ...
    @overload
    def __getitem__(self, index: slice) -> list[Name]: ...
    def __getitem__(self, index: int | slice) -> Name | list[Name]:
        if isinstance(index, slice):
            return [self._name(i) for i in range(*index.indices(len(self)))]
        return self._name(range(len(self))[index])

    def _name(self, index: int) -> Name:
        row = bytes(self._packed[index * _WIDTH : (index + 1) * _WIDTH])
        grouping = f"{self._ledger}-{row[32:64].hex()}" if row[64] & 1 else None
        return Name(f"{self._ledger}-{row[:32].hex()}", grouping, bool(row[64] & 2))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedNames) and self._packed == other._packed

    __hash__ = None  # type: ignore[assignment]

    def distinct(self) -> PackedNames:
        """Each name once, in the order of its bytes."""
        rows = self._rows().copy()
        rows[:, -1] = 1
        return PackedNames(self._ledger, bytearray(np.unique(rows.view(f"V{_WIDTH}")).tobytes()))

    def document_digests(self) -> np.ndarray:
        """[documents] of 32 bytes: each document's own digest, in the order of the bytes."""
        rows = self._rows()
        return np.sort(np.ascontiguousarray(rows[rows[:, -1] == 1, :32]).view("V32").ravel())

    @classmethod
    def joined(cls, shards: Sequence[PackedNames]) -> PackedNames:
        """Those of several processes."""
        return cls(shards[0]._ledger, bytearray().join(s._packed for s in shards))


class Digests(Sequence[str]):
    """The digests of names."""

    def __init__(self, names: PackedNames) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        names = self._names[index]
        return names.digest if isinstance(names, Name) else [n.digest for n in names]
