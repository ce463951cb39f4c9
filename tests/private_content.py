"""A search for private content in bytes that were written or shown: text, token ids, rows, in the spellings that a leak could take."""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

WINDOW = 4  # neighbouring values of a row that are looked for together
RUN = 5  # token ids, after the first
DECIMALS = re.compile(rb"-?\d+\.(\d{3,})(?:[eE]([-+]?\d+))?")


@dataclass(frozen=True)
class PrivateContent:
    """texts; ids: integer tensors [n]; rows: float tensors [n, C] (embeddings, keys, values)."""

    texts: tuple[str, ...] = ()
    ids: tuple[torch.Tensor, ...] = ()
    rows: tuple[torch.Tensor, ...] = ()

    def __add__(self, other: PrivateContent) -> PrivateContent:
        return PrivateContent(self.texts + other.texts, self.ids + other.ids, self.rows + other.rows)

    def needles(self) -> dict[bytes, str]:
        """Byte strings that must not occur, and what each is."""
        return dict(itertools.chain(self._of_texts(), self._of_ids(), self._of_rows(), self._digests()))

    def _of_texts(self) -> Iterator[tuple[bytes, str]]:
        for text in self.texts:
            for word in text.split():
                if len(word) > 3:
                    yield word.encode(), "a word"
                    yield word.encode("utf-16-le"), "a word in UTF-16"
                    yield word.encode().hex().encode(), "a word in hex"
            yield base64.b64encode(text.encode())[:12], "a text in base64"

    def _of_ids(self) -> Iterator[tuple[bytes, str]]:
        for ids in self.ids:
            some = ids.tolist()[1 : 1 + RUN]
            for kind in "qih":
                yield struct.pack(f"<{len(some)}{kind}", *some), "token ids as bytes"

    def _of_rows(self) -> Iterator[tuple[bytes, str]]:
        for rows in self.rows:
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
                cast = rows.detach().to(dtype).contiguous()
                raw = cast.view(torch.uint8).numpy().tobytes()
                step, line = WINDOW * cast.element_size(), cast.shape[1] * cast.element_size()
                for start in range(0, len(raw), line):
                    for i in range(start, start + line - step + 1, step):
                        if any(raw[i : i + step]):
                            yield raw[i : i + step], f"a row as {dtype}"

    def _digests(self) -> Iterator[tuple[bytes, str]]:
        """Unkeyed digests, under which guesses could be tried."""
        contents = [t.encode() for t in self.texts]
        contents += [i.to(d).numpy().tobytes() for i in self.ids for d in (torch.int64, torch.int32)]
        contents += [r.detach().float().contiguous().numpy().tobytes() for r in self.rows]
        for content, name in itertools.product(contents, ("md5", "sha1", "sha256")):
            digest = hashlib.new(name, content)
            yield digest.digest(), f"an unkeyed {name}"
            yield digest.hexdigest().encode(), f"an unkeyed {name}"

    def find(self, blob: bytes, needles: dict[bytes, str] | None = None) -> list[str]:
        """What of it occurs in the blob."""
        known = self.needles() if needles is None else needles
        found = {what for needle, what in known.items() if needle in blob}
        for ids in self.ids:
            run = rb"\D{1,6}".join(str(i).encode() for i in ids.tolist()[1 : 1 + RUN])
            if re.search(rb"(?<!\d)" + run + rb"(?!\d)", blob):
                found.add("token ids as text")
        return sorted(found | ({"a row as decimal text"} if self._decimal(blob) else set()))

    def _decimal(self, blob: bytes) -> bool:
        """Three neighbouring numbers of the text are, to their printed digits, three neighbouring values of a row.

        With 4 decimals a number of the text is within rounding of a given value with probability below 1e-4, three in a row below 1e-12;
        for 10^3 numbers and 10^3 values that is a false alarm in at most 1e-6 of runs, and far less for numbers of 17 digits.
        """
        numbers = [
            (float(m[0]), 0.51 * 10.0 ** (int(m[2] or 0) - len(m[1])))
            for m in DECIMALS.finditer(blob)
            if len(m[1]) >= 4
        ]
        if len(numbers) < 3 or not self.rows:
            return False
        values = np.concatenate([r.detach().double().numpy().ravel() for r in self.rows])
        hits = [np.abs(values - x) <= tolerance for x, tolerance in numbers]
        return any(
            bool((a[:-2] & b[1:-1] & c[2:]).any()) for a, b, c in zip(hits, hits[1:], hits[2:], strict=False)
        )


def check_clean(blobs: dict[str, bytes], content: PrivateContent) -> None:
    """Fails with where and what, never with the content."""
    needles = content.needles()
    found = {where: what for where, blob in blobs.items() if (what := content.find(blob, needles))}
    assert not found, found
