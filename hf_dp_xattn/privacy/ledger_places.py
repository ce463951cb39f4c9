"""Which `Store` a ledger's address means: memory, a file, or a database."""

from __future__ import annotations

from pathlib import Path

from ..errors import ConfigError
from .ledger_file import FileStore, MemoryStore, Store

SQLITE = "sqlite:///"
POSTGRESQL = ("postgresql://", "postgres://")


def is_address(where: str | Path) -> bool:
    """Whether it names a database, and is no file's path."""
    return isinstance(where, str) and where.startswith((SQLITE, *POSTGRESQL))


def store_at(where: str | Path | Store | None, timeout: float, key: str | Path | None) -> Store:
    """The store of an address.

    Args:
        where: see `Ledger`.
        timeout: seconds to wait for another process's lock.
        key: the key's file, of a database.

    Raises:
        LedgerError: it cannot be opened.
        ConfigError: a key that is not used, or none where one is needed.
    """
    if isinstance(where, str) and where.startswith(POSTGRESQL):
        from .ledger_postgresql import PostgresqlStore  # an optional dependency

        if key is None:
            raise ConfigError(
                "A ledger in PostgreSQL needs key=FILE, the same file on each machine: dpx.Ledger(url, key=...) makes it with the ledger. "
                "Contexts are named under it, so that the database alone does not let anyone test guesses of a prompt."
            )
        return PostgresqlStore(where, key, timeout)
    if isinstance(where, str) and where.startswith(SQLITE):
        from .ledger_sqlite import SqliteStore

        return SqliteStore(where.removeprefix(SQLITE), key, timeout)
    if key is not None:
        raise ConfigError(
            "A key's file is named for a ledger in a database only; a file's key lies beside it."
        )
    if where is None:
        return MemoryStore()
    return FileStore(where, timeout) if isinstance(where, (str, Path)) else where
