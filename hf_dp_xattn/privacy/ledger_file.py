"""Where charges are kept: a sealed file with its key and its lock, or memory. `Store` is all that a `Ledger` asks of such a place.

A file says nothing of a context without its key, and an edited, damaged, foreign or older one is refused. Someone who may write the files
can restore an old copy of them; while a store lives it notices (its own charges are gone), a new process cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import weakref
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import BaseFileLock, FileLock, Timeout

from ..errors import ConfigError, LedgerError
from .charges import Charge, charge_from_dict

_SCHEMA = "hf_dp_xattn.ledger/2"
_SCHEMA_1 = "hf_dp_xattn.ledger/1"  # its charges do not say how rows were grouped
_KEY_SCHEMA = "hf_dp_xattn.ledger-key/1"
_KEY_LINE = re.compile(rf"{re.escape(_KEY_SCHEMA)} (new|in-use) ([0-9a-f]{{64}})\n")


class Store(Protocol):
    """One account under one key, of which one thread of one process at a time holds a reservation.

    key: under which contexts are named. place: where it is, for people. path: the file, resolved; None where there is none. persistent:
    charges outlive the process. at_hand: this process may use it.
    """

    key: bytes

    @property
    def place(self) -> str: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def persistent(self) -> bool: ...
    @property
    def at_hand(self) -> bool: ...

    def reserve(self) -> None:
        """Nobody else adds a charge until `abort`. Raises LedgerError, and holds nothing then."""
        ...

    def charges(self, digests: Collection[str] | None) -> tuple[Charge, ...]:
        """Of what is reserved, with what was added since: the charges of these names at least (None: all charges), oldest first."""
        ...

    def add(self, charges: Sequence[Charge]) -> None:
        """Further charges; they are dropped unless they are committed."""
        ...

    def commit(self) -> None:
        """What was added outlives whatever happens after this returns."""
        ...

    def abort(self) -> None:
        """Lets go of a reservation; what was committed stays."""
        ...


def mac(key: bytes, purpose: bytes, content: bytes = b"") -> str:
    return hmac.new(key, purpose + b"\0" + content, hashlib.sha256).hexdigest()


def _seal(charges: Sequence[Charge], key: bytes) -> bytes:
    body: dict[str, Any] = {"schema": _SCHEMA, "key_id": mac(key, b"key-id")[:16]}
    body["charges"] = [c.to_dict() for c in charges]
    canonical = json.dumps(body, sort_keys=True, allow_nan=False).encode()
    body["checksum"] = mac(key, b"checksum", canonical)
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
    if body["key_id"] != mac(key, b"key-id")[:16]:
        raise LedgerError(f"The key file belongs to another ledger. {help_}")
    checksum = body.pop("checksum")
    expected = mac(key, b"checksum", json.dumps(body, sort_keys=True).encode())
    if not isinstance(checksum, str) or not hmac.compare_digest(checksum.encode(), expected.encode()):
        raise LedgerError(f"The checksum of the ledger does not match: it was edited or damaged. {help_}")
    try:
        known = {} if body["schema"] == _SCHEMA else {"grouping": None}
        return tuple(charge_from_dict({**known, **c}) for c in body["charges"])
    except (ConfigError, LedgerError, TypeError, KeyError) as error:
        raise LedgerError(f"A charge cannot be read ({error}). {help_}") from None


def _fsync_directory(directory: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
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


def open_key(path: Path, in_use: bool, begin: Callable[[bytes], None]) -> bytes:
    """The key of an account. What is on disk, in order: key 'new'; plus the empty account; key 'in-use'; then charges.

    Args:
        path: of the key.
        in_use: whether there is an account.
        begin: makes an empty one, which is there for good when it returns.

    Raises:
        LedgerError: a key that is missing or damaged.
    """
    if not path.exists():
        if in_use:
            raise LedgerError(f"{path.name}, the ledger's key, is missing. Restore it from a backup.")
        write_whole(path, f"{_KEY_SCHEMA} new {secrets.token_hex(32)}\n".encode())
    match = _KEY_LINE.fullmatch(path.read_bytes().decode("latin-1"))
    if match is None:
        raise LedgerError(f"{path.name} is damaged. Restore it from a backup.")
    key = bytes.fromhex(match[2])
    if match[1] == "new":
        if not in_use:
            begin(key)
        write_whole(path, f"{_KEY_SCHEMA} in-use {key.hex()}\n".encode())
    return key


class MemoryStore:
    """Charges that are forgotten when this process ends; a forked child cannot reach them."""

    path = None
    place = "in memory"
    persistent = False

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self.lock = threading.RLock()
        self._pid = os.getpid()
        self._charges: tuple[Charge, ...] = ()
        _stores.add(self)

    @property
    def at_hand(self) -> bool:
        return os.getpid() == self._pid

    def reserve(self) -> None:
        if not self.at_hand:
            raise LedgerError(
                "An in-memory ledger does not reach other processes, and this one was forked: it serves the releases that there "
                "are, and makes no new ones. Use a path: ledger=dpx.Ledger(path), or the variable HF_DP_XATTN_LEDGER=path."
            )
        self.lock.acquire()
        self._added: list[Charge] = []

    def charges(self, digests: Collection[str] | None) -> tuple[Charge, ...]:
        return (*self._charges, *self._added)

    def add(self, charges: Sequence[Charge]) -> None:
        self._added += charges

    def commit(self) -> None:
        self._charges = (*self._charges, *self._added)

    def abort(self) -> None:
        self.lock.release()


class FileStore:
    """`path` holds the charges; `path + ".key"` a random key (mode 0600); `path + ".lock"` is held while either is used.

    Every reservation reads the file anew. Raises LedgerError as `Ledger`.
    """

    at_hand = True
    persistent = True

    def __init__(self, path: str | Path, timeout: float) -> None:
        self.lock = threading.RLock()
        self._timeout = timeout
        self._file_lock: BaseFileLock | None = None
        self._inherited: BaseFileLock | None = None
        self._seen: tuple[str, ...] = ()
        self._charges: tuple[Charge, ...] = ()
        self._added: list[Charge] = []
        self.path = Path(path).expanduser().resolve()
        _stores.add(self)
        if not self.path.parent.is_dir():
            raise LedgerError(f"The directory of the ledger {self.path.name!r} does not exist; create it.")
        self._acquire()
        try:
            key_path = self.path.with_name(self.path.name + ".key")
            self.key = open_key(
                key_path, self.path.exists(), lambda key: write_whole(self.path, _seal((), key))
            )
            self._read()
        finally:
            self.abort()

    @property
    def place(self) -> str:
        return self.path.name

    def reserve(self) -> None:
        self._acquire()
        try:
            self._charges, self._added = self._read(), []
        except BaseException:
            self.abort()
            raise

    def charges(self, digests: Collection[str] | None) -> tuple[Charge, ...]:
        return (*self._charges, *self._added)

    def add(self, charges: Sequence[Charge]) -> None:
        self._added += charges

    def commit(self) -> None:
        if self._added:
            every = (*self._charges, *self._added)
            write_whole(self.path, _seal(every, self.key))
            self._seen = tuple(c.id for c in every)

    def abort(self) -> None:
        if self._file_lock is not None:
            self._file_lock.release()
        self.lock.release()

    def _acquire(self) -> None:
        self.lock.acquire()
        try:
            self._file_lock = FileLock(str(self.path) + ".lock", timeout=self._timeout, mode=0o600)
            self._file_lock.acquire()
        except BaseException as error:
            self.lock.release()
            if isinstance(error, Timeout):
                raise LedgerError("The ledger is locked by another process; try again later.") from None
            if isinstance(error, (OSError, NotImplementedError)):
                raise LedgerError(f"The ledger cannot be locked ({type(error).__name__}).") from error
            raise

    def _read(self) -> tuple[Charge, ...]:
        try:
            if os.stat(self.path).st_nlink > 1:
                raise LedgerError("The ledger file has a second hard link, which hides charges; remove it.")
            charges = _open_seal(self.path.read_bytes(), self.key, self.path.name)
        except FileNotFoundError:
            raise LedgerError(
                f"The ledger {self.path.name} is gone, though its key {self.path.name}.key says that it was in use. Restore it from a "
                "backup. (Only where no release of it is in anybody's hands: remove the key as well, and begin a new ledger.)"
            ) from None
        except OSError as error:
            raise LedgerError(f"The ledger cannot be read ({type(error).__name__}).") from error
        ids = tuple(c.id for c in charges)
        if ids[: len(self._seen)] != self._seen:
            raise LedgerError("Charges are gone from the ledger: was an old copy restored? Nothing spent.")
        self._seen = ids
        return charges


_stores: weakref.WeakSet[MemoryStore | FileStore] = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked child: no thread is left that could let go."""
    for store in _stores:
        store.lock = threading.RLock()
        if isinstance(store, FileStore):
            # kept: where it is dropped, some versions of filelock let go of what a thread of the parent holds
            store._inherited = store._file_lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
