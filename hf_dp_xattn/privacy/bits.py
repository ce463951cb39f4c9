"""Random bits: the operating system's for a release, a seeded stream for tests, and unbiased integers.

Nothing here keeps bits between two calls, so a process that forks cannot hand one stretch of the
stream to two children.
"""

from __future__ import annotations

import os
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hf_dp_xattn.errors import ConfigError, DPXAttnError

__all__ = ["Entropy", "SeededEntropy", "SystemEntropy"]

_CHUNK_BYTES = 1 << 24  # longest single request to the operating system
_MAX_ROUNDS = 1000  # rejection rounds before a source is called broken


@runtime_checkable
class Entropy(Protocol):
    """A source of uniform random bytes. `private` says whether an attacker cannot predict them."""

    @property
    def private(self) -> bool:
        """True only for a source fit for a release."""
        ...

    def random_bytes(self, n: int) -> bytes:
        """Exactly `n` fresh random bytes."""
        ...


class SystemEntropy:
    """The operating system's cryptographic generator (`os.urandom`): the source for every release.

    On Linux this is `getrandom(2)`, which waits until the kernel's pool is initialised. There is no
    buffer and no fallback: when the operating system cannot deliver, its `OSError` (or
    `NotImplementedError`) reaches the caller and no noise is made.

    Errors: `DPXAttnError` when the operating system returns fewer bytes than asked for.
    """

    @property
    def private(self) -> bool:
        return True

    def random_bytes(self, n: int) -> bytes:
        if n <= _CHUNK_BYTES:
            parts = [os.urandom(n)]
        else:
            parts = [os.urandom(min(_CHUNK_BYTES, n - i)) for i in range(0, n, _CHUNK_BYTES)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(data) != n:
            raise DPXAttnError(f"the operating system gave {len(data)} random bytes where {n} were asked for")
        return data

    def __repr__(self) -> str:
        return "SystemEntropy()"


class SeededEntropy:
    """A reproducible stream for tests and debugging. NOT PRIVATE: whoever knows the seed removes the noise.

    It is a PCG64 stream, whose raw output numpy keeps stable across versions. `private` is False, and
    callers print that into every report that such noise went into. An instance is not thread-safe.

    Errors: `ConfigError` when the seed is not a nonnegative int.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ConfigError(f"seed must be a nonnegative int, got {type(seed).__name__}")
        self._generator = np.random.PCG64(int(seed))

    @property
    def private(self) -> bool:
        return False

    def random_bytes(self, n: int) -> bytes:
        words = np.asarray(self._generator.random_raw(-(-n // 8)), dtype="<u8")
        return words.tobytes()[:n]

    def __repr__(self) -> str:
        return "SeededEntropy(<seed>)"


def read_exactly(entropy: Entropy, n: int) -> bytes:
    """`n` bytes of `entropy`; a source that gives another number is an error, never padded."""
    data = entropy.random_bytes(n)
    if len(data) != n:
        raise DPXAttnError(f"{entropy!r} gave {len(data)} bytes where {n} were asked for")
    return data


def words32(entropy: Entropy, n: int) -> npt.NDArray[np.uint32]:
    """`n` independent uniform words of 32 bits."""
    return np.frombuffer(read_exactly(entropy, 4 * n), dtype="<u4")


def coin_flips(entropy: Entropy, n: int) -> npt.NDArray[np.uint8]:
    """`n` independent fair bits, as 0 or 1."""
    packed = np.frombuffer(read_exactly(entropy, -(-n // 8)), dtype=np.uint8)
    return np.unpackbits(packed, count=n)


def uniform_below(entropy: Entropy, n: int, bound: int) -> npt.NDArray[np.int64]:
    """`n` independent integers, each exactly uniform on {0, ..., bound - 1}, for 1 <= bound <= 2^48.

    A word w of b bits (32 for a bound up to 2^16, else 64) is kept when it lies below
    bound * floor(2^b / bound), and then stands for w mod bound: each residue has the same number of
    words, so there is no modulo bias. At most one word in 2^16 is rejected.
    """
    if not 1 <= bound <= 1 << 48:
        raise ConfigError(f"uniform_below needs 1 <= bound <= 2^48, got {bound}")
    if bound == 1:
        return np.zeros(n, dtype=np.int64)
    bits, dtype = (32, np.dtype("<u4")) if bound <= 1 << 16 else (64, np.dtype("<u8"))
    last_kept = bound * ((1 << bits) // bound) - 1
    power_of_two = bound & (bound - 1) == 0
    out = np.empty(n, dtype=np.int64)
    filled = 0
    for _ in range(_MAX_ROUNDS):
        if filled == n:
            return out
        words = np.frombuffer(read_exactly(entropy, (n - filled) * bits // 8), dtype=dtype)
        if power_of_two:
            out[filled:] = np.bitwise_and(words, dtype.type(bound - 1))
            return out
        if words.max() > last_kept:
            words = words[words <= dtype.type(last_kept)]
        # w mod bound, by a division that numpy vectorises (its remainder is several times slower).
        quotient = np.floor_divide(words, dtype.type(bound))
        out[filled : filled + words.size] = words - quotient * dtype.type(bound)
        filled += words.size
    raise DPXAttnError(f"{entropy!r} does not look random: {_MAX_ROUNDS} rounds of rejection were not enough")
