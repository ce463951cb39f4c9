"""Charges in a PostgreSQL database, for several machines. Needs psycopg (pip install "hf_dp_xattn[postgresql]")."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError, LedgerError
from .ledger_sql import SqlStore

try:
    import psycopg
except ImportError:  # an optional dependency
    psycopg = None  # type: ignore[assignment]

_LOCK = 0x6870_6478  # of this ledger's transactions, among the database's advisory locks


class PostgresqlStore(SqlStore):
    """Three tables (dpx_account, dpx_charges, dpx_terms) in the connection's schema; one transaction at a time.

    A charge is in the server's log on disk when `commit` returns (synchronous_commit=on). A failover to a replica that lags behind loses
    charges: replicate synchronously.

    Args:
        url: postgresql://USER@HOST:PORT/DATABASE; a password is better in a password file than here.
        key: the key's file, the same on each machine; made with the ledger.
        timeout: seconds to wait for others.

    Raises:
        ConfigError: psycopg is not installed.
        LedgerError: see `Ledger`.
    """

    mark = "%s"

    def __init__(self, url: str, key: str | Path, timeout: float) -> None:
        if psycopg is None:
            raise ConfigError('A ledger in PostgreSQL needs psycopg: pip install "hf_dp_xattn[postgresql]".')
        self._url, self.errors = url, psycopg.Error
        try:
            parameters = psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.Error as error:
            raise ConfigError("This is no address of a PostgreSQL database.") from error
        self.place = (
            f"PostgreSQL database {parameters.get('dbname', '')} on {parameters.get('host', 'this machine')}"
        )
        super().__init__(Path(key).expanduser().resolve(), timeout)

    def connect(self, create: bool) -> Any:
        return psycopg.connect(self._url, connect_timeout=max(2, int(self.timeout)))

    def begin(self) -> None:
        self.execute(f"SET LOCAL lock_timeout = {max(1, int(self.timeout * 1000))}")
        self.execute("SET LOCAL synchronous_commit = on")
        try:
            self.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        except psycopg.errors.LockNotAvailable:
            raise LedgerError("The ledger is locked by another process; try again later.") from None

    def has_tables(self) -> bool:
        return self.execute("SELECT to_regclass('dpx_account')").fetchone()[0] is not None
