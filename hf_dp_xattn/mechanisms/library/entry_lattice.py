r"""The entries of a public library that are nearest to a private code: exact, and a function of that code alone, bit for bit.

As in `anchors/quantizer.py`, all is integers held in float64, so that neither the other units nor their number, order or memory can move
an entry's rank:

    z     = (x - center) M, clamped to a public box                      exact (`ExactAffine`)
    z'    = round(2^(BITS - e) z), 2^e the power of two above max |z|    elementwise, by this unit's own largest coordinate
    score = z' . c_j,  c_j = round(127 unit code of entry j / largest)   |score| <= p 2^(BITS + 7)
    key   = 2^20 score + (2^20 - 1 - j)                                  < 2^53: no two entries tie

The entries' codes have length 1 before they are rounded, so the order by score is that of the cosine, whatever the length of z.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ...errors import ConfigError
from ...privacy.lattice import exact_matmul
from ...privacy.response import MAX_ALPHABET
from ..anchors.quantizer import ExactAffine
from ..inputs import check_context

_BITS = 12
_CODE_LIMIT = 127
_ENTRIES = 2**14  # entries whose codes are held in float64 at once
_UNITS = 256
MAX_WIDTH = 2**12


def unit_codes(rows: torch.Tensor, center: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """Public rows [n, C] -> float32 [n, p] of length 1, as scores see them; a row that is mapped to 0 stays 0."""
    z = (rows.to(torch.float32) - center.to(torch.float32)) @ projection.to(torch.float32)
    return torch.nn.functional.normalize(z, dim=-1)


def lattice_codes(units: torch.Tensor) -> torch.Tensor:
    """Codes of length 1 [n, p] -> int8 [n, p], on one scale."""
    largest = float(units.abs().max().clamp_min(1e-30)) if len(units) else 1.0
    return torch.round(units * (_CODE_LIMIT / largest)).to(torch.int8)


@dataclass(frozen=True, eq=False)
class EntryLattice:
    """Public entries in a public projected space.

    map: from a code [C] to p coordinates. codes [K, p]: int8, by `lattice_codes`.

    Raises:
        ConfigError: too many entries or dimensions for exact keys, or shapes that do not fit.
    """

    map: ExactAffine
    codes: torch.Tensor

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.int8 or self.codes.shape[1] != self.map.width:
            raise ConfigError(f"Codes of entries must be int8 [K, {self.map.width}].")
        if self.size > MAX_ALPHABET or self.map.width > MAX_WIDTH:
            raise ConfigError(
                f"A library has at most {MAX_ALPHABET} entries in {MAX_WIDTH} dimensions, this one has {self.size} in {self.map.width}."
            )

    @property
    def size(self) -> int:
        """Number of entries K."""
        return self.codes.shape[0]

    def integers(self, rows: torch.Tensor) -> torch.Tensor:
        """[m, C] -> float64 [m, p] that holds integers of BITS bits; each row by itself."""
        z = self.map(rows).cpu().numpy()
        _, exponent = np.frexp(np.abs(z).max(axis=1, initial=0.0))
        return torch.from_numpy(np.rint(np.ldexp(z, (_BITS - exponent)[:, None])))

    def nearest(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """[m, C] -> int64 [m, count] (CPU): the nearest entries of each row, nearest first; private.

        *Formal guarantee.* A row's entries are a function of that row and of public parameters alone (see the module's text).

        Raises:
            ConfigError, ContextError: see `check_context`; more entries than there are.
        """
        if not 0 <= count <= self.size:
            raise ConfigError(f"There are {self.size} entries, {count} were asked for.")
        m = check_context(rows, self.map.channels, may_be_empty=True)
        indices = torch.empty(m, count, dtype=torch.int64)
        for start in range(0, m, _UNITS):
            z = self.integers(rows[start : start + _UNITS])
            best = z.new_empty(len(z), 0)
            for first in range(0, self.size if count else 0, _ENTRIES):
                best = torch.cat([best, self._keys(z, first)], dim=1).topk(
                    min(count, first + _ENTRIES, self.size), dim=1
                )[0]
            indices[start : start + _UNITS] = MAX_ALPHABET - 1 - best.remainder(MAX_ALPHABET).to(torch.int64)
        return indices

    def _keys(self, z: torch.Tensor, first: int) -> torch.Tensor:
        codes = self.codes[first : first + _ENTRIES].to("cpu", torch.float64)
        scores = exact_matmul(z, codes.mT, self.map.width * 2.0 ** (_BITS + 7))
        index = torch.arange(first, first + len(codes), dtype=torch.float64)
        return scores * MAX_ALPHABET + (MAX_ALPHABET - 1 - index)
