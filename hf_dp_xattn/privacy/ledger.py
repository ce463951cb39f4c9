"""What each context has spent: charged before anything is computed, never refunded, never understated.

A charge is on disk before `Ledger.charge` returns, so a crash afterwards loses a release, never the record
of it. A release that failed after its charge stays charged: its noise may have been seen.

*Scope.* What one neighbouring step changes must be the same in all that is composed: unit, relation and (for groups) which rows are a unit.
Charges of one digest that differ in it are refused.

*What the ledger does not do.* It accounts per digest: the same text under two digests (other tokenizer, other
normalisation) is two contexts. Someone who may write the files can restore an old copy of them; while a
ledger object lives it notices (its own charges are gone), a new process cannot. Notes and times are public.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import math
import os
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from filelock import FileLock, Timeout

from ..errors import BudgetExceededError, ConfigError, LedgerError
from .accountant import Event, epsilon_of, event_from_dict, needs_delta
from .units import NeighboringRelation, Unit

_SCHEMA = "hf_dp_xattn.ledger/2"
_SCHEMA_1 = "hf_dp_xattn.ledger/1"  # its charges do not say how rows were grouped
_KEY_SCHEMA = "hf_dp_xattn.ledger-key/1"
_TOLERANCE = 1e-9  # covers the outward rounding of `epsilon_of`, nothing else
_DIGEST = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")
_KEY_LINE = re.compile(rf"{re.escape(_KEY_SCHEMA)} (new|in-use) ([0-9a-f]{{64}})\n")
_FIELDS = (
    *("id", "digest", "events", "epsilon_before", "epsilon_after", "delta", "number_of_releases", "time"),
    *("note", "unit", "neighboring", "grouping"),
)

REUSE = "Use the release that exists (it serves any number of queries), spend less, or raise it."


@dataclass(frozen=True)
class Budget:
    """What a context may spend in total: epsilon at delta, and (optionally) for which unit and relation.

    Charges under different units or relations do not compose, so a ledger refuses to mix them on one digest.

    Args:
        epsilon: in total, in (0, inf).
        delta: in total, in [0, 1).
        unit: of the guarantee; by default the config's.
        neighboring: its relation; by default the config's.

    Raises:
        ConfigError: a value is out of range, or unknown.

    Example:
        >>> protected = dpx.protect(pipe, dpx.DPXAttnConfig(epsilon=4.0), budget=dpx.Budget(8.0, 1e-5))
        >>> first = protected.release("a red circle")
        >>> second = protected.release("a red circle", fresh=True)  # both are paid from the one budget
    """

    epsilon: float
    delta: float
    unit: Unit | str | None = None
    neighboring: NeighboringRelation | str | None = None

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ConfigError(f"{name} of a budget must be a finite number, not {value!r}.")
        if self.epsilon <= 0 or not 0 <= self.delta < 1:
            raise ConfigError("A budget needs epsilon > 0 and delta in [0, 1).")
        try:
            if self.unit is not None:
                object.__setattr__(self, "unit", Unit(self.unit))
            if self.neighboring is not None:
                object.__setattr__(self, "neighboring", NeighboringRelation(self.neighboring))
        except ValueError as error:
            raise ConfigError(f"Unknown unit or neighbouring relation: {error}.") from None

    def scoped(self, unit: str, neighboring: str) -> Budget:
        """This budget for what is released in that unit and relation.

        Args:
            unit: of the releases.
            neighboring: their relation.

        Raises:
            ConfigError: it is for others.
        """
        own = dataclasses.replace(self, unit=unit, neighboring=neighboring)
        for name, given in (("unit", self.unit), ("neighboring", self.neighboring)):
            if given not in (None, getattr(own, name)):
                raise ConfigError(
                    f"The budget is for {name}={str(given)!r}, the config releases with {name}={str(getattr(own, name))!r}, and one says "
                    "nothing about the other. Make them agree, or leave it out of the budget."
                )
        return own

    def _scope(self) -> tuple[str | None, str | None]:
        return (
            None if self.unit is None else Unit(self.unit).value,
            None if self.neighboring is None else NeighboringRelation(self.neighboring).value,
        )


class Name(NamedTuple):
    """What is charged: a context by its digest; and, of unit="group", how its rows are grouped (`Ledger.grouping`). former: a name of
    before, charged only where the ledger holds charges of it."""

    digest: str
    grouping: str | None = None
    former: bool = False


@dataclass(frozen=True)
class Charge:
    """One charge. `number_of_releases` counts the charges of this context up to and with this one. grouping: of unit="group", which rows
    are a unit (`Ledger.grouping`); None where that is not known, as of what an earlier version charged."""

    id: str
    digest: str
    epsilon_before: float
    epsilon_after: float
    delta: float
    number_of_releases: int
    time: str
    events: tuple[Event, ...] = ()
    note: Mapping[str, Any] = field(default_factory=dict)
    unit: str | None = None
    neighboring: str | None = None
    grouping: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"events": [e.to_dict() for e in self.events], "note": dict(self.note)}


def _charge_from_dict(data: Any) -> Charge:
    if not isinstance(data, dict) or set(data) != set(_FIELDS):
        raise LedgerError("A charge in the ledger has unknown or missing fields.")
    if data["grouping"] is not None and not _DIGEST.fullmatch(data["grouping"]):
        raise LedgerError("A charge in the ledger has no valid grouping.")
    events = tuple(event_from_dict(e) for e in data["events"])
    if not events or not _DIGEST.fullmatch(data["digest"]):
        raise LedgerError("A charge in the ledger has no events or no valid digest.")
    return Charge(**(data | {"events": events}))


def _mac(key: bytes, purpose: bytes, content: bytes = b"") -> str:
    return hmac.new(key, purpose + b"\0" + content, hashlib.sha256).hexdigest()


def _seal(charges: Sequence[Charge], key: bytes) -> bytes:
    body: dict[str, Any] = {"schema": _SCHEMA, "key_id": _mac(key, b"key-id")[:16]}
    body["charges"] = [c.to_dict() for c in charges]
    canonical = json.dumps(body, sort_keys=True, allow_nan=False).encode()
    body["checksum"] = _mac(key, b"checksum", canonical)
    return (json.dumps(body, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def _open_seal(raw: bytes, key: bytes, where: str) -> tuple[Charge, ...]:
    help_ = f"{where}: nothing was changed. Restore ledger and key from a backup; do not start afresh."
    try:
        body = json.loads(raw)
    except ValueError:
        raise LedgerError(f"The ledger is not JSON (truncated or damaged). {help_}") from None
    if not isinstance(body, dict) or body.get("schema") not in (_SCHEMA, _SCHEMA_1):
        raise LedgerError(f"The ledger is not of the schema {_SCHEMA!r}. {help_}")
    if set(body) != {"schema", "key_id", "charges", "checksum"}:
        raise LedgerError(f"The ledger has unknown or missing fields. {help_}")
    if body["key_id"] != _mac(key, b"key-id")[:16]:
        raise LedgerError(f"The key file belongs to another ledger. {help_}")
    checksum = body.pop("checksum")
    expected = _mac(key, b"checksum", json.dumps(body, sort_keys=True).encode())
    if not isinstance(checksum, str) or not hmac.compare_digest(checksum.encode(), expected.encode()):
        raise LedgerError(f"The checksum of the ledger does not match: it was edited or damaged. {help_}")
    try:
        known = {} if body["schema"] == _SCHEMA else {"grouping": None}
        return tuple(_charge_from_dict({**known, **c}) for c in body["charges"])
    except (ConfigError, LedgerError, TypeError, KeyError) as error:
        raise LedgerError(f"A charge cannot be read ({error}). {help_}") from None


def _fsync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    """Old file or new file, nothing between; the new one is on disk on return. The lock is held."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _fsync_directory(path.parent)


def _epsilon(events: Sequence[Event], delta: float) -> float:
    if delta == 0 and needs_delta(events):
        return math.inf
    return epsilon_of(events, delta)


def _check_note(note: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in note.items():
        scalar = value is None or isinstance(value, (str, bool, int, float))
        if not isinstance(name, str) or not scalar or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError("A note maps strings to JSON scalars.")
        if len(name) > 64 or (isinstance(value, str) and len(value) > 200):
            raise ConfigError("A note is short (64 / 200 characters) and public: no private text.")
    return dict(note)


def _names(digests: Sequence[str | Name]) -> list[Name]:
    return [d if isinstance(d, Name) else Name(d) for d in digests]


_ledgers: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _renew_locks() -> None:
    for ledger in _ledgers:
        ledger._thread_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


class Ledger:
    """What every context has spent, in a file or (path None) in memory, forgotten at exit.

    `path` holds the charges; `path + ".key"` a random key (mode 0600) under which contexts are named, so
    that a leaked ledger alone does not let anyone test guesses of a prompt; `path + ".lock"` is held while
    either is used. Processes and threads may share a path; every operation reads the file anew.

    *Formal guarantee.* Let every release of a context be charged, before it is computed, under one fixed
    budget with noise levels that do not depend on earlier outputs (or all Gaussian, or all pure with delta
    = 0: see `privacy.accountant`). Then all releases of that context together are (budget.epsilon (1 +
    1e-9), budget.delta)-DP in the budget's unit and relation. Budgets are per call; what was spent follows
    from the events alone.

    Args:
        path: the file, made if it is not there; None: in memory.
        timeout: seconds to wait for another process's lock.

    Raises:
        LedgerError: a damaged, foreign or unlockable file, a missing key, or a missing directory.

    Example:
        >>> ledger = dpx.Ledger("spent.json")
        >>> release = dpx.protect(pipe, dpx.DPXAttnConfig(), ledger=ledger).release("a red circle")
        >>> len(dpx.Ledger("spent.json").entries()) > 0  # it outlives the process
        True
    """

    def __init__(self, path: str | Path | None = None, *, timeout: float = 60.0) -> None:
        self._thread_lock = threading.RLock()
        self._timeout = timeout
        self._pid = os.getpid()
        self._seen: tuple[str, ...] = ()
        self._memory: tuple[Charge, ...] = ()
        self._path = None if path is None else Path(path).expanduser().resolve()
        _ledgers.add(self)
        if self._path is None:
            self._key = secrets.token_bytes(32)
            return
        if not self._path.parent.is_dir():
            raise LedgerError(f"The directory of the ledger {self._path.name!r} does not exist; create it.")
        with self._locked():
            self._key = self._open_or_create()
            self._read()

    @property
    def persistent(self) -> bool:
        """Whether charges outlive the process."""
        return self._path is not None

    @property
    def at_hand(self) -> bool:
        """Whether this process may read and charge it: one in memory stays with the process that made it, and not with its forks."""
        return self._path is not None or os.getpid() == self._pid

    @property
    def path(self) -> Path | None:
        """The file, resolved; None in memory."""
        return self._path

    def __repr__(self) -> str:
        return f"Ledger({'in memory' if self._path is None else self._path.name!r})"

    def __getstate__(self) -> NoReturn:
        raise LedgerError("A ledger cannot be pickled or copied: it holds a key. Open its path again.")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._thread_lock:
            if self._path is None:
                if not self.at_hand:
                    raise LedgerError(
                        "An in-memory ledger does not reach other processes, and this one was forked: it serves the releases that there "
                        "are, and makes no new ones. Use a path: ledger=dpx.Ledger(path), or the variable HF_DP_XATTN_LEDGER=path."
                    )
                yield
                return
            lock = FileLock(str(self._path) + ".lock", timeout=self._timeout, mode=0o600)
            try:
                lock.acquire()
            except Timeout:
                raise LedgerError("The ledger is locked by another process; try again later.") from None
            except (OSError, NotImplementedError) as error:
                raise LedgerError(f"The ledger cannot be locked ({type(error).__name__}).") from error
            try:
                yield
            finally:
                lock.release()

    def _open_or_create(self) -> bytes:
        """The key. Disk states, in order: key 'new'; plus the empty ledger; key 'in-use'; then charges."""
        assert self._path is not None
        key_path = self._path.with_name(self._path.name + ".key")
        if not key_path.exists():
            if self._path.exists():
                raise LedgerError(f"{key_path.name}, the ledger's key, is missing. Restore it from a backup.")
            _write(key_path, f"{_KEY_SCHEMA} new {secrets.token_hex(32)}\n".encode())
        match = _KEY_LINE.fullmatch(key_path.read_bytes().decode("latin-1"))
        if match is None:
            raise LedgerError(f"{key_path.name} is damaged. Restore it from a backup.")
        key = bytes.fromhex(match[2])
        if match[1] == "new":
            if not self._path.exists():
                _write(self._path, _seal((), key))
            _write(key_path, f"{_KEY_SCHEMA} in-use {key.hex()}\n".encode())
        return key

    def _read(self) -> tuple[Charge, ...]:
        if self._path is None:
            return self._memory
        try:
            if os.stat(self._path).st_nlink > 1:
                raise LedgerError("The ledger file has a second hard link, which hides charges; remove it.")
            charges = _open_seal(self._path.read_bytes(), self._key, self._path.name)
        except FileNotFoundError:
            raise LedgerError(
                f"The ledger {self._path.name} is gone, though its key {self._path.name}.key says that it was in use. Restore it from a "
                "backup. (Only where no release of it is in anybody's hands: remove the key as well, and begin a new ledger.)"
            ) from None
        except OSError as error:
            raise LedgerError(f"The ledger cannot be read ({type(error).__name__}).") from error
        ids = tuple(c.id for c in charges)
        if ids[: len(self._seen)] != self._seen:
            raise LedgerError("Charges are gone from the ledger: was an old copy restored? Nothing spent.")
        self._seen = ids
        return charges

    def digest(self, parts: Iterable[bytes]) -> str:
        """Name of a context: keyed HMAC-SHA256 of the parts, each preceded by its length.

        Different lists of parts are different messages (the encoding is injective). The first 16 hex digits
        name the ledger, so that a digest from another ledger is refused.

        Args:
            parts: what the context is told from others by.

        Raises:
            ConfigError: parts that are not bytes.
        """
        return self._keyed(b"context", parts)

    def grouping(self, parts: Iterable[bytes]) -> str:
        """Name of a grouping: a keyed digest as of a context.

        Args:
            parts: equal ones for equal groupings.

        Raises:
            ConfigError: parts that are not bytes.
        """
        return self._keyed(b"grouping", parts)

    def _keyed(self, purpose: bytes, parts: Iterable[bytes]) -> str:
        if isinstance(parts, (str, bytes, bytearray, memoryview)):
            raise ConfigError("digest takes a list of byte strings, not one string.")
        mac = hmac.new(self._key, purpose + b"\0", hashlib.sha256)
        for part in parts:
            if not isinstance(part, (bytes, bytearray, memoryview)):
                raise ConfigError(f"The parts of a digest must be bytes, not {type(part).__name__}.")
            data = bytes(part)
            mac.update(len(data).to_bytes(8, "big"))
            mac.update(data)
        return f"{_mac(self._key, b'key-id')[:16]}-{mac.hexdigest()}"

    def _check_digest(self, digest: str) -> str:
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise ConfigError("Not a digest of a ledger; make one with ledger.digest(parts).")
        if not digest.startswith(_mac(self._key, b"key-id")[:16]):
            raise ConfigError("The digest was made by another ledger; make it with this one.")
        return digest

    @staticmethod
    def _assess(
        earlier: Sequence[Charge],
        name: Name,
        events: tuple[Event, ...],
        budget: Budget,
        note: dict[str, Any],
        epsilon: Callable[[tuple[Event, ...]], float],
    ) -> Charge:
        requested = epsilon(events)
        scope = budget._scope()
        if any((c.unit, c.neighboring) != scope for c in earlier):
            raise ConfigError(
                "This context was charged under another unit or neighbouring relation, and the two do not "
                "compose. Use the release that exists, or release it under the earlier one. (A public text that is only tried out can have "
                "a ledger of its own: ledger=dpx.Ledger().) Nothing was charged."
            )
        grouped = scope[0] == Unit.GROUP.value or name.grouping is not None
        if grouped and any(c.grouping is None or c.grouping != name.grouping for c in earlier):
            raise ConfigError(
                "This context was charged under another grouping of its rows (or in another way of encoding groups apart, or by a version "
                "that did not record it): a unit of the one is not a unit of the other, and the two do not compose. Use the release that "
                "exists, or release it under the earlier grouping. Nothing was charged."
            )
        old = tuple(e for c in earlier for e in c.events)
        spent, after = epsilon(old), epsilon((*old, *events))
        after = max(spent, after)
        if not after <= budget.epsilon * (1 + _TOLERANCE):
            raise BudgetExceededError(
                f"This release would exceed the context's budget: epsilon {spent:.6g} is spent in "
                f"{len(earlier)} release(s), the new one alone costs {requested:.6g}, together {after:.6g}, "
                f"of a budget of {budget.epsilon:.6g} at delta = {budget.delta:.3g}. Nothing was charged. "
                f"{REUSE}"
            )
        time = datetime.now(UTC).isoformat(timespec="seconds")
        id_, delta, count = secrets.token_hex(8), float(budget.delta), len(earlier) + 1
        return Charge(id_, name.digest, spent, after, delta, count, time, events, note, *scope, name.grouping)

    def _assess_all(
        self,
        before: Sequence[Charge],
        names: Sequence[Name],
        events: Sequence[Event],
        budget: Budget,
        note: dict[str, Any],
    ) -> tuple[Charge, ...]:
        new = tuple(events)
        if not new:
            raise ConfigError("A charge needs at least one event.")
        of: dict[str, list[Charge]] = {self._check_digest(name.digest): [] for name in names}
        for name in names:
            if name.grouping is not None:
                self._check_digest(name.grouping)
        for charge in before:
            if charge.digest in of:
                of[charge.digest].append(charge)
        known: dict[tuple[Event, ...], float] = {}  # documents of one corpus have mostly spent alike

        def epsilon(spent: tuple[Event, ...]) -> float:
            if spent not in known:
                known[spent] = _epsilon(spent, budget.delta)
            return known[spent]

        made = []
        for name in names:
            if name.former and not of[name.digest]:
                continue
            made.append(self._assess(of[name.digest], name, new, budget, note, epsilon))
            of[name.digest].append(made[-1])
        return tuple(made)

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
        clean = _check_note(note or {})
        with self._locked():
            charges = self._read()
            made = self._assess_all(charges, _names(digests), events, budget, clean)
            if self._path is None:
                self._memory = (*charges, *made)
            elif made:
                _write(self._path, _seal((*charges, *made), self._key))
                self._seen = (*self._seen, *(c.id for c in made))
            return made

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
        with self._locked():
            return self._assess_all(self._read(), _names(digests), events, budget, {})

    def most(self, digests: Iterable[str], delta: float) -> tuple[int, float]:
        """Of several names, the largest number of charges and the largest epsilon spent; (0, 0) where none was charged.

        Args:
            digests: names of contexts.
            delta: at which epsilon is stated.
        """
        wanted = set(digests)
        events: dict[str, list[Event]] = {}
        numbers: dict[str, int] = {}
        for c in self.entries():
            if c.digest in wanted:
                events.setdefault(c.digest, []).extend(c.events)
                numbers[c.digest] = numbers.get(c.digest, 0) + 1
        distinct = {tuple(e) for e in events.values()}  # documents of one corpus have mostly spent alike
        return max(numbers.values(), default=0), max((_epsilon(e, delta) for e in distinct), default=0.0)

    def spent(self, digest: str, delta: float) -> float:
        """Epsilon spent; 0 if never charged, inf at delta 0 after a release that needs a delta.

        Args:
            digest: names the context.
            delta: at which epsilon is stated.
        """
        return _epsilon([e for c in self.charges(digest) for e in c.events], delta)

    def charges(self, digest: str) -> tuple[Charge, ...]:
        """The charges of one context, oldest first.

        Args:
            digest: names the context.
        """
        self._check_digest(digest)
        return tuple(c for c in self.entries() if c.digest == digest)

    def entries(self) -> tuple[Charge, ...]:
        """All charges, oldest first."""
        with self._locked():
            return self._read()
