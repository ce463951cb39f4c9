"""Charges in an SQLite file, for processes of one machine. Its log (WAL) needs a local disk: no network file system."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ..errors import LedgerError
from .ledger_sql import SqlStore

_BUSY = "The ledger is locked by another process; try again later."


class SqliteStore(SqlStore):
    """A charge is on disk when `commit` returns (synchronous=FULL).

    Args:
        path: the file, made if it is not there.
        key: of its key; by default beside it.
        timeout: seconds to wait for others.

    Raises:
        LedgerError: see `Ledger`.

    Example:
        >>> ledger = dpx.Ledger("sqlite:///spent.db")
        >>> release = dpx.protect(pipe, calibration=library, ledger=ledger).release("a red circle")
        >>> len(ledger.entries()) > 0
        True
    """

    mark = "?"
    errors = sqlite3.Error

    def __init__(self, path: str | Path, key: str | Path | None, timeout: float) -> None:
        self.path: Path = Path(path).expanduser().resolve()
        self.place = self.path.name
        if not self.path.parent.is_dir():
            raise LedgerError(f"The directory of the ledger {self.path.name!r} does not exist; create it.")
        key_path = (
            self.path.with_name(self.path.name + ".key") if key is None else Path(key).expanduser().resolve()
        )
        super().__init__(key_path, timeout)

    def connect(self, create: bool) -> sqlite3.Connection:
        if create:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # its mode, which the log inherits
        elif not self.path.exists():
            raise LedgerError(
                f"The ledger {self.place} is gone, though its key {self._key_path.name} says that it was in use. Restore it from a backup."
            )
        connection = sqlite3.connect(
            self.path, timeout=self.timeout, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def begin(self) -> None:
        try:
            self.execute("PRAGMA journal_mode = WAL")
            self.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise LedgerError(_BUSY) from None
            raise

    def has_tables(self) -> bool:
        row = self.execute("SELECT COUNT(*) FROM sqlite_master WHERE name = 'dpx_account'").fetchone()
        return bool(row[0])

    def words_of(self, error: Exception) -> str:
        code = getattr(error, "sqlite_errorcode", None)
        if code is not None and code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            return self._broken()
        return super().words_of(error)
