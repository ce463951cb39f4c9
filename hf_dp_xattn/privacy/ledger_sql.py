"""Charges as rows of a database: a charge writes its own rows, and looks at those of its own names alone, however many there are.

*Seals.* Every row carries a MAC of its charge and place, the account one of their number and of the sum of their MACs, all under the
ledger's key. Each use checks the account, the number of rows, the rows that it reads, and that the charges of a name are numbered
without a gap. What it cannot see is a row whose name was edited, as it is looked for under its name: a whole read does (`Ledger.entries`,
and opening a ledger of up to `WHOLE` charges). An older copy of the whole database is noticed by a process that saw a newer one, not
by a new process.
"""

from __future__ import annotations

import hmac
import json
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from ..errors import ConfigError, LedgerError
from .charges import Charge, charge_from_dict
from .ledger_file import mac, open_key

SCHEMA = "hf_dp_xattn.ledger-sql/1"
_TABLES = (
    "CREATE TABLE dpx_account (one INTEGER PRIMARY KEY CHECK (one = 1), format TEXT NOT NULL, key_id TEXT NOT NULL, "
    "charges BIGINT NOT NULL, total TEXT NOT NULL, seal TEXT NOT NULL)",
    # what all charges of one release share
    "CREATE TABLE dpx_terms (id BIGINT PRIMARY KEY, body TEXT NOT NULL)",
    "CREATE TABLE dpx_charges (seq BIGINT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL, units TEXT, spent_before DOUBLE PRECISION "
    "NOT NULL, spent_after DOUBLE PRECISION NOT NULL, nth BIGINT NOT NULL, terms BIGINT NOT NULL, seal TEXT NOT NULL)",
    "CREATE INDEX dpx_charges_digest ON dpx_charges (digest)",
)
_SHARED = ("delta", "events", "neighboring", "note", "time", "unit")
_SELECT = (
    "SELECT c.seq, c.id, c.digest, c.units, c.spent_before, c.spent_after, c.nth, t.body, c.seal FROM dpx_charges c "
    "JOIN dpx_terms t ON t.id = c.terms"
)
_CHUNK = 500
WHOLE = 100_000  # charges that are all read when a ledger is opened
_MODULUS = 2**128
GONE = "Charges are gone from the ledger: was an old copy restored? Nothing spent."


class Account(NamedTuple):
    """charges: their number. total: sum of their seals modulo 2^128."""

    charges: int
    total: int


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


class SqlStore(ABC):
    """One account in one database. A connection lives as long as a reservation, so that none is open when the process forks.

    Args:
        key_path: of the key.
        timeout: seconds to wait for others.
    """

    at_hand = True
    persistent = True
    path: Path | None = None
    place: str
    mark: str  # of a parameter in a statement
    errors: type[Exception]

    def __init__(self, key_path: Path, timeout: float) -> None:
        self.lock = threading.RLock()
        self.timeout = timeout
        self._key_path = key_path
        self._connection: Any = None
        self._account = Account(0, 0)
        self._last = ""
        self._seen: tuple[int, str] = (0, "")  # the last charge that was there: its place, its seal
        _stores.add(self)
        if not key_path.parent.is_dir():
            raise LedgerError(
                f"The directory of the ledger's key {key_path.name!r} does not exist; create it."
            )
        self.key = self._open()

    @abstractmethod
    def connect(self, create: bool) -> Any:
        """A connection (DB-API). create: the database may be made."""

    @abstractmethod
    def begin(self) -> None:
        """Starts a transaction that no other process of the ledger is in; raises LedgerError where one stays in it."""

    @abstractmethod
    def has_tables(self) -> bool: ...

    # ---- `Store` ---------------------------------------------------------------------------------------------------------------

    def reserve(self) -> None:
        self.lock.acquire()
        try:
            with self._in_our_words():
                self._connection = self.connect(False)
                self.begin()
                if not self.has_tables():
                    raise LedgerError(
                        f"The ledger {self.place} is gone, though its key {self._key_path.name} says that it was in use. Restore it from "
                        "a backup. (Only where no release of it is in anybody's hands: remove the key as well, and begin a new ledger.)"
                    )
                self._account = self._read_account()
        except BaseException:
            self.abort()
            raise

    def charges(self, digests: Collection[str] | None) -> tuple[Charge, ...]:
        with self._in_our_words():
            return self._read(digests)

    def add(self, charges: Sequence[Charge]) -> None:
        if charges:
            with self._in_our_words():
                seals = self._insert(charges)
            total = sum(seals, self._account.total) % _MODULUS
            self._account = Account(self._account.charges + len(charges), total)

    def commit(self) -> None:
        with self._in_our_words():
            self.execute(
                f"UPDATE dpx_account SET charges = {self.mark}, total = {self.mark}, seal = {self.mark}",
                (self._account.charges, f"{self._account.total:032x}", self._seal_account()),
            )
            self._connection.commit()
        self._seen = self._account.charges, self._last

    def abort(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(self.errors):  # what is not committed falls with the connection
                connection.rollback()
            with suppress(self.errors):
                connection.close()
        self.lock.release()

    # ---- rows ------------------------------------------------------------------------------------------------------------------

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """One statement on the reservation's connection; the only way to the database."""
        return self._connection.execute(statement, values)

    def execute_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        self._connection.cursor().executemany(statement, rows)

    def _insert(self, charges: Sequence[Charge]) -> list[int]:
        """Writes charges; gives their seals."""
        known: dict[str, int] = {}
        last = int(self.execute("SELECT COALESCE(MAX(id), 0) FROM dpx_terms").fetchone()[0])
        rows, seals = [], []
        for seq, charge in enumerate(charges, self._account.charges + 1):
            values = charge.to_dict()
            body = _canonical({name: values[name] for name in _SHARED})
            terms = known.setdefault(body, last + 1 + len(known))
            seal = self._seal(seq, values)
            seals.append(int(seal, 16))
            self._last = seal
            spent = (charge.epsilon_before, charge.epsilon_after, charge.number_of_releases)
            rows.append((seq, charge.id, charge.digest, charge.grouping, *spent, terms, seal))
        self.execute_many(
            f"INSERT INTO dpx_terms VALUES ({self._marks(2)})", [(i, body) for body, i in known.items()]
        )
        self.execute_many(f"INSERT INTO dpx_charges VALUES ({self._marks(9)})", rows)
        return seals

    def _marks(self, count: int) -> str:
        return ", ".join([self.mark] * count)

    def _read(self, digests: Collection[str] | None) -> tuple[Charge, ...]:
        if digests is None:
            rows = self.execute(f"{_SELECT} ORDER BY c.seq").fetchall()
            total = sum(int(row[-1], 16) for row in rows) % _MODULUS
            if (len(rows), total) != self._account:
                raise LedgerError(f"{self._broken()} Rows are missing, or were added.")
        else:
            rows, names = [], sorted(digests)
            for start in range(0, len(names), _CHUNK):
                part = names[start : start + _CHUNK]
                rows += self.execute(
                    f"{_SELECT} WHERE c.digest IN ({self._marks(len(part))})", part
                ).fetchall()
            rows.sort()  # by place
        charges, numbers = tuple(map(self._charge, rows)), dict[str, int]()
        for charge in charges:
            numbers[charge.digest] = numbers.get(charge.digest, 0) + 1
            if charge.number_of_releases != numbers[charge.digest]:
                raise LedgerError(f"{self._broken()} A charge of a context is missing.")
        return charges

    def _charge(self, row: Sequence[Any]) -> Charge:
        seq, id_, digest, units, before, after, nth, body, seal = row
        try:
            values = {"id": id_, "digest": digest, "grouping": units, "epsilon_before": before}
            values |= {"epsilon_after": after, "number_of_releases": nth, **json.loads(body)}
            if not hmac.compare_digest(str(seal), self._seal(seq, values)):
                raise LedgerError(f"{self._broken()} A charge was edited.")
            return charge_from_dict(values)
        except (ConfigError, TypeError, KeyError, ValueError) as error:
            raise LedgerError(f"{self._broken()} A charge cannot be read ({error}).") from None

    def _seal(self, seq: int, values: dict[str, Any]) -> str:
        return mac(self.key, b"charge", f"{seq} {_canonical(values)}".encode())[:32]

    # ---- the account -----------------------------------------------------------------------------------------------------------

    def _seal_account(self) -> str:
        return mac(self.key, b"account", f"{SCHEMA} {self._account}".encode())

    def _read_account(self) -> Account:
        rows = self.execute("SELECT format, key_id, charges, total, seal FROM dpx_account").fetchall()
        if len(rows) != 1 or rows[0][0] != SCHEMA:
            raise LedgerError(f"{self._broken()} It is not of the format {SCHEMA!r}.")
        _, key_id, charges, total, seal = rows[0]
        if key_id != mac(self.key, b"key-id")[:16]:
            raise LedgerError(
                f"The key {self._key_path.name} belongs to another ledger than {self.place}. Nothing was changed."
            )
        self._account = Account(int(charges), int(total, 16))
        if not hmac.compare_digest(str(seal), self._seal_account()):
            raise LedgerError(f"{self._broken()} The seal of its account does not match.")
        if self.execute(f"SELECT COUNT(*) FROM ({_SELECT}) AS c").fetchone()[0] != self._account.charges:
            raise LedgerError(f"{self._broken()} Rows are missing, or were added.")
        if self._account.charges < self._seen[0] or self._seal_at(self._seen[0]) != self._seen[1]:
            raise LedgerError(GONE)
        self._last = self._seal_at(self._account.charges)
        self._seen = self._account.charges, self._last
        return self._account

    def _seal_at(self, seq: int) -> str:
        """Of the charge at a place; "" of none."""
        found = self.execute(f"SELECT seal FROM dpx_charges WHERE seq = {self.mark}", (seq,)).fetchone()
        return "" if found is None else str(found[0])

    def _broken(self) -> str:
        return f"The ledger {self.place} was edited or damaged; nothing was changed. Restore it and its key from a backup."

    def _open(self) -> bytes:
        def first(key: bytes) -> None:
            self.key, self._account = key, Account(0, 0)
            for statement in _TABLES:
                self.execute(statement)
            values = (1, SCHEMA, mac(key, b"key-id")[:16], 0, f"{0:032x}", self._seal_account())
            self.execute(f"INSERT INTO dpx_account VALUES ({self._marks(6)})", values)
            self._connection.commit()

        try:
            # two processes may open it for the first time at once
            with FileLock(f"{self._key_path}.lock", timeout=self.timeout, mode=0o600), self._in_our_words():
                self._connection = self.connect(not self._in_use())
                self.begin()
                self.key = open_key(self._key_path, self.has_tables(), first)
        except OSError as error:
            raise LedgerError(f"The ledger cannot be opened ({type(error).__name__}).") from error
        finally:
            self.lock.acquire()  # which `abort` lets go of
            self.abort()
        self.reserve()
        try:
            if self._account.charges <= WHOLE:
                self.charges(None)
        finally:
            self.abort()
        return self.key

    def _in_use(self) -> bool:
        return self._key_path.exists() and b"in-use" in self._key_path.read_bytes()

    @contextmanager
    def _in_our_words(self) -> Iterator[None]:
        """What a database raises, in our words."""
        try:
            yield
        except self.errors as error:
            raise LedgerError(self.words_of(error)) from error

    def words_of(self, error: Exception) -> str:
        return (
            f"The ledger {self.place} cannot be used ({type(error).__name__}). What was being charged may or may not be recorded: compute "
            "nothing, and see to the database."
        )


_stores: weakref.WeakSet[SqlStore] = weakref.WeakSet()
_held: list[SqlStore] = []


def _hold() -> None:
    """Before a fork: no reservation is open, as a child may not inherit a connection."""
    for store in list(_stores):
        store.lock.acquire()
        _held.append(store)


def _let_go() -> None:
    while _held:
        _held.pop().lock.release()


def _renew() -> None:
    while _held:
        _held.pop().lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_renew)
