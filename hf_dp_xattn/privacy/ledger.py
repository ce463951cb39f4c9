"""What each context has spent: charged before anything is computed, never refunded, never understated.

A charge is on disk before `Ledger.charge` returns, so a crash afterwards loses a release, never the record
of it. A release that failed after its charge stays charged: its noise may have been seen.

*What the ledger does not do.* It accounts per digest: the same text under two digests (other tokenizer, other
normalisation) is two contexts. Notes and times are public.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError, LedgerError
from .accountant import Event
from .charges import DIGEST, REUSE, Budget, Charge, Name, assess_all, check_note, epsilon_at
from .ledger_file import Store, mac
from .ledger_places import store_at

_CHUNK = 5000  # names that are looked at together

__all__ = ["REUSE", "Budget", "Charge", "Ledger", "Name"]


class Namer:
    """Names contexts under a ledger's key, also in other processes of a job than the one that charges. Holds the key: keep it as a secret.

    Args:
        key: of the ledger.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.id = mac(key, b"key-id")[:16]

    def digest(self, parts: Iterable[bytes]) -> str:
        """See `Ledger.digest`."""
        return self._keyed(b"context", parts)

    def grouping(self, parts: Iterable[bytes]) -> str:
        """See `Ledger.grouping`."""
        return self._keyed(b"grouping", parts)

    def _keyed(self, purpose: bytes, parts: Iterable[bytes]) -> str:
        if isinstance(parts, (str, bytes, bytearray, memoryview)):
            raise ConfigError("digest takes a list of byte strings, not one string.")
        named = hmac.new(self._key, purpose + b"\0", hashlib.sha256)
        for part in parts:
            if not isinstance(part, (bytes, bytearray, memoryview)):
                raise ConfigError(f"The parts of a digest must be bytes, not {type(part).__name__}.")
            data = bytes(part)
            named.update(len(data).to_bytes(8, "big"))
            named.update(data)
        return f"{self.id}-{named.hexdigest()}"


class Ledger:
    """What every context has spent, in a file, a database, or (path None) in memory, forgotten at exit.

    `path` holds the charges; `path + ".key"` a random key (mode 0600) under which contexts are named, so
    that a leaked ledger alone does not let anyone test guesses of a prompt; `path + ".lock"` is held while
    either is used. Processes and threads may share a path; every operation reads the file anew. A file is
    written whole at each charge: for more than some thousand contexts take a database, of which one
    charge writes its own rows only: SQLite on one machine, PostgreSQL for several.

    *Formal guarantee.* Let every release of a context be charged, before it is computed, under one fixed
    budget with noise levels that do not depend on earlier outputs (or all Gaussian, or all pure with delta
    = 0: see `privacy.accountant`). Then all releases of that context together are (budget.epsilon (1 +
    1e-9), budget.delta)-DP in the budget's unit and relation. Budgets are per call; what was spent follows
    from the events alone.

    Args:
        path: the file, made if it is not there; "sqlite:///FILE" (a relative path; "sqlite:////..." an absolute one) or
            "postgresql://USER@HOST/DATABASE"; a `Store` of your own; None: in memory.
        timeout: seconds to wait for another process's lock.
        key: the key's file, made with the ledger; by default beside the file. A PostgreSQL ledger needs it: the same one on each machine.

    Raises:
        LedgerError: a damaged, foreign or unlockable file or database, a missing key, or a missing directory.
        ConfigError: a `key` where none is used, or none where one is needed.

    Example:
        >>> ledger = dpx.Ledger("spent.json")
        >>> release = dpx.protect(pipe, calibration=library, ledger=ledger).release("a red circle")
        >>> len(dpx.Ledger("spent.json").entries()) > 0  # it outlives the process
        True
    """

    def __init__(
        self,
        path: str | Path | Store | None = None,
        *,
        timeout: float = 60.0,
        key: str | Path | None = None,
    ) -> None:
        self._store = store_at(path, timeout, key)
        self._namer = Namer(self._store.key)

    @property
    def persistent(self) -> bool:
        """Whether charges outlive the process."""
        return self._store.persistent

    @property
    def at_hand(self) -> bool:
        """Whether this process may read and charge it: one in memory stays with the process that made it, and not with its forks."""
        return self._store.at_hand

    @property
    def path(self) -> Path | None:
        """The file, resolved; None where there is none."""
        return self._store.path

    @property
    def place(self) -> str:
        """Where it is, in words: a file's name, a database (without a password), or "in memory"."""
        return self._store.place

    def __repr__(self) -> str:
        return f"Ledger({self.place if not self.persistent else repr(self.place)})"

    def __getstate__(self) -> NoReturn:
        raise LedgerError("A ledger cannot be pickled or copied: it holds a key. Open its path again.")

    @contextmanager
    def _reserved(self) -> Iterator[Store]:
        """The store; what is not committed inside is dropped."""
        self._store.reserve()
        try:
            yield self._store
        finally:
            self._store.abort()

    def digest(self, parts: Iterable[bytes]) -> str:
        """Name of a context: keyed HMAC-SHA256 of the parts, each preceded by its length.

        Different lists of parts are different messages (the encoding is injective). The first 16 hex digits
        name the ledger, so that a digest from another ledger is refused.

        Args:
            parts: what the context is told from others by.

        Raises:
            ConfigError: parts that are not bytes.
        """
        return self._namer.digest(parts)

    def grouping(self, parts: Iterable[bytes]) -> str:
        """Name of a grouping: a keyed digest as of a context.

        Args:
            parts: equal ones for equal groupings.

        Raises:
            ConfigError: parts that are not bytes.
        """
        return self._namer.grouping(parts)

    def namer(self) -> Namer:
        """What names contexts as this ledger does, and charges nothing."""
        return self._namer

    def _check_digest(self, digest: str) -> str:
        if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
            raise ConfigError("Not a digest of a ledger; make one with ledger.digest(parts).")
        if not digest.startswith(self._namer.id):
            raise ConfigError("The digest was made by another ledger; make it with this one.")
        return digest

    def charge(
        self,
        digest: str | Name,
        events: Sequence[Event],
        budget: Budget,
        *,
        note: Mapping[str, Any] | None = None,
    ) -> Charge:
        """Record `events` against the context, or refuse. Call it BEFORE the private rows are computed with.

        All events ever charged to `digest` are composed with the new ones by `epsilon_of` at budget.delta.
        On return the charge is on disk. If an exception other than the ones below escapes (a full disk),
        the charge may or may not have been recorded; compute nothing. Charges are never deleted or
        refunded, not even for a failed release.

        Args:
            digest: names the context.
            events: of one release.
            budget: what the context may spend in total.
            note: public; strings, numbers and booleans.

        Raises:
            BudgetExceededError: beyond the budget.
            ConfigError: invalid arguments.
            LedgerError: the file.
        """
        return self.charge_all([digest], events, budget, note=note)[0]

    def charge_all(
        self,
        digests: Sequence[str | Name],
        events: Sequence[Event],
        budget: Budget,
        *,
        note: Mapping[str, Any] | None = None,
    ) -> tuple[Charge, ...]:
        """`charge` of one release of several names: all of them, or none, in one write. A name that comes twice is charged twice.

        Args:
            digests: names of contexts.
            events: of one release.
            budget: what each may spend in total.
            note: public, in each charge.

        Raises:
            BudgetExceededError, ConfigError, LedgerError: see `charge`.
        """
        assessed: list[Charge] = []
        self._spend(digests, events, budget, note, assessed.extend)
        return tuple(assessed)

    def charge_corpus(
        self,
        digests: Sequence[str | Name],
        events: Sequence[Event],
        budget: Budget,
        *,
        note: Mapping[str, Any] | None = None,
    ) -> None:
        """`charge_all` of millions of names: in a database in bounded memory, as no charge is kept.

        Args:
            digests: names of contexts.
            events: of one release.
            budget: what each may spend in total.
            note: public, in each charge.

        Raises:
            BudgetExceededError, ConfigError, LedgerError: see `charge`.
        """
        self._spend(digests, events, budget, note, lambda charges: None)

    def _spend(
        self,
        digests: Sequence[str | Name],
        events: Sequence[Event],
        budget: Budget,
        note: Mapping[str, Any] | None,
        keep: Callable[[Sequence[Charge]], None],
        record: bool = True,
    ) -> None:
        """All charges, or none: assessed some at a time, and committed together."""
        clean, time = check_note(note or {}), datetime.now(UTC).isoformat(timespec="seconds")
        with self._reserved() as store:
            for start in range(0, max(1, len(digests)), _CHUNK):
                names = self._names(digests[start : start + _CHUNK])
                before = store.charges({n.digest for n in names})
                assessed = assess_all(before, names, tuple(events), budget, clean, time)
                store.add(assessed)
                keep(assessed)
            if record:
                store.commit()

    def check(self, digest: str | Name, events: Sequence[Event], budget: Budget) -> Charge:
        """What `charge` would return (or raise) now, without recording it; it may not fit later.

        Args:
            digest: names the context.
            events: of one release.
            budget: what the context may spend in total.
        """
        return self.check_all([digest], events, budget)[0]

    def check_all(
        self, digests: Sequence[str | Name], events: Sequence[Event], budget: Budget
    ) -> tuple[Charge, ...]:
        """What `charge_all` would return (or raise) now.

        Args:
            digests: names of contexts.
            events: of one release.
            budget: what each may spend in total.
        """
        assessed: list[Charge] = []
        self._spend(digests, events, budget, None, assessed.extend, record=False)
        return tuple(assessed)

    def check_corpus(self, digests: Sequence[str | Name], events: Sequence[Event], budget: Budget) -> None:
        """What `charge_corpus` would raise now.

        Args:
            digests: names of contexts.
            events: of one release.
            budget: what each may spend in total.
        """
        self._spend(digests, events, budget, None, lambda charges: None, record=False)

    def _names(self, digests: Sequence[str | Name]) -> list[Name]:
        names = [d if isinstance(d, Name) else Name(d) for d in digests]
        for digest in (d for name in names for d in (name.digest, name.grouping) if d is not None):
            self._check_digest(digest)
        return names

    def _of(self, digests: Collection[str]) -> tuple[Charge, ...]:
        """Their charges, oldest first."""
        with self._reserved() as store:
            return tuple(c for c in store.charges(digests) if c.digest in digests)

    def most(self, digests: Sequence[str], delta: float) -> tuple[int, float]:
        """Of several names, the largest number of charges and the largest epsilon spent; (0, 0) where none was charged.

        Args:
            digests: names of contexts.
            delta: at which epsilon is stated.
        """
        most, distinct = 0, set[tuple[Event, ...]]()  # documents of one corpus have mostly spent alike
        for start in range(0, len(digests), _CHUNK):
            events: dict[str, list[Event]] = {}
            numbers: dict[str, int] = {}
            for c in self._of(set(digests[start : start + _CHUNK])):
                events.setdefault(c.digest, []).extend(c.events)
                numbers[c.digest] = numbers.get(c.digest, 0) + 1
            most = max([most, *numbers.values()])
            distinct |= {tuple(e) for e in events.values()}
        return most, max((epsilon_at(e, delta) for e in distinct), default=0.0)

    def spent(self, digest: str, delta: float) -> float:
        """Epsilon spent; 0 if never charged, inf at delta 0 after a release that needs a delta.

        Args:
            digest: names the context.
            delta: at which epsilon is stated.
        """
        return epsilon_at([e for c in self.charges(digest) for e in c.events], delta)

    def charges(self, digest: str) -> tuple[Charge, ...]:
        """The charges of one context, oldest first.

        Args:
            digest: names the context.
        """
        return self._of({self._check_digest(digest)})

    def entries(self) -> tuple[Charge, ...]:
        """All charges, oldest first."""
        with self._reserved() as store:
            return store.charges(None)
