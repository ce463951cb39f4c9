"""Ledgers in a database: the same account as in memory, races between processes, a kill at every statement, edited rows."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sqlite3
import threading
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_dp_xattn.privacy.ledger_sql as ledger_module
from hf_dp_xattn.errors import BudgetExceededError, ConfigError, DPXAttnError, LedgerError
from hf_dp_xattn.privacy.accountant import PureEvent
from hf_dp_xattn.privacy.ledger import Budget, Ledger, Name

from .databases import reason_to_skip, server

fork = multiprocessing.get_context("fork")
ONE = [PureEvent(1)]
PARTS = [b"a secret prompt about purple elephants"]


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory):
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with server(tmp_path_factory.mktemp("postgresql") / "server") as url:
        yield url


@pytest.fixture(params=("sqlite", "postgresql"))
def address(request, tmp_path):
    """Arguments of a new ledger."""
    if request.param == "sqlite":
        return {"path": f"sqlite:///{tmp_path / 'ledger.db'}"}
    return {"path": _database(request.getfixturevalue("postgresql")), "key": tmp_path / "ledger.key"}


def _database(url):
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return url.rsplit("/", 1)[0] + f"/{name}"


def _raw(address, statement):
    """One statement by somebody who may write the database, and has no key."""
    if address["path"].startswith("sqlite"):
        with sqlite3.connect(address["path"].removeprefix("sqlite:///")) as connection:
            return (
                connection.execute(statement).fetchall()
                if statement.startswith("SELECT")
                else connection.execute(statement)
            )
    import psycopg

    with psycopg.connect(address["path"]) as connection:
        found = connection.execute(statement)
        return found.fetchall() if statement.startswith("SELECT") else found


def test_charges_add_up_are_refused_beyond_the_budget_and_outlive_the_ledger(address):
    ledger = Ledger(**address)
    assert ledger.persistent and "elephant" not in repr(ledger) and "tester" not in repr(ledger)
    digest, other = ledger.digest(PARTS), ledger.digest([b"other"])
    for i in range(3):
        checked = ledger.check(digest, ONE, Budget(3, 0))
        charge = ledger.charge(digest, ONE, Budget(3, 0), note={"mechanism": "anchors"})
        assert (charge.epsilon_before, charge.epsilon_after, charge.number_of_releases) == (i, i + 1, i + 1)
        assert checked.epsilon_after == charge.epsilon_after and charge.events == tuple(ONE)
    for call in (ledger.check, ledger.charge):
        with pytest.raises(BudgetExceededError, match="3 is spent in 3"):
            call(digest, ONE, Budget(3, 0))
    again = Ledger(**address)
    assert again.digest(PARTS) == digest and again.entries() == ledger.entries()
    assert again.spent(digest, 0) == 3 and again.spent(other, 0) == 0 and len(again.charges(digest)) == 3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
            st.floats(0.25, 2),
            st.sampled_from(("row", "group")),
        ),
        max_size=6,
    )
)
def test_the_same_account_as_in_memory(tmp_path_factory, steps):
    """Whatever is charged: the same answers, the same refusals."""
    database, memory = Ledger(f"sqlite:///{tmp_path_factory.mktemp('twin') / 'ledger.db'}"), Ledger()

    def told(ledger, chosen, epsilon, unit):
        units = ledger.grouping([b"units"]) if unit == "group" else None
        names = [Name(ledger.digest([bytes([i])]), units) for i in chosen]
        try:
            made = ledger.charge_all(
                names, [PureEvent(epsilon)], Budget(3, 0, unit, "replace_one"), note={"n": 1}
            )
            return [
                (c.epsilon_before, c.epsilon_after, c.number_of_releases, c.unit, dict(c.note)) for c in made
            ]
        except DPXAttnError as error:
            return type(error), str(error)

    for step in steps:
        assert told(database, *step) == told(memory, *step)
    for i in range(4):
        one, two = (ledger.spent(ledger.digest([bytes([i])]), 0) for ledger in (database, memory))
        assert one == two
    assert len(database.entries()) == len(memory.entries())


# --- races and kills


def _spend(address, ready, results):
    ledger = Ledger(**address)
    digest = ledger.digest(PARTS)
    ready.wait()
    won = 0
    for _ in range(3):
        try:
            ledger.charge(digest, ONE, Budget(7, 0))
            won += 1
        except BudgetExceededError:
            pass
    results.put(won)


def _race(address, processes=8):
    ready, results = fork.Barrier(processes), fork.Queue()
    workers = [fork.Process(target=_spend, args=(address, ready, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    won = sum(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    return won


def test_eight_processes_that_open_and_hammer_it_get_exactly_seven(address):
    Ledger(**address)
    assert _race(address) == 7
    assert len(Ledger(**address).entries()) == 7


def test_the_race_catches_a_transaction_that_does_not_exclude_others(address, monkeypatch):
    """Power: where a charge does not lock, the same race admits more, or ends in rows that clash."""
    Ledger(**address)

    def begin(self):
        threading.Event().wait(0.01)

    def reserve(self, real=ledger_module.SqlStore.reserve):
        real(self)
        threading.Event().wait(0.02)  # widens the window

    monkeypatch.setattr("hf_dp_xattn.privacy.ledger_sqlite.SqliteStore.begin", begin)
    monkeypatch.setattr("hf_dp_xattn.privacy.ledger_postgresql.PostgresqlStore.begin", begin)
    monkeypatch.setattr(ledger_module.SqlStore, "reserve", reserve)
    outcomes = fork.Queue()

    def work():
        try:
            ledger = Ledger(**address)
            digest = ledger.digest(PARTS)
            for _ in range(4):
                ledger.charge(digest, ONE, Budget(1e6, 0))
            outcomes.put("fine")
        except LedgerError as error:
            outcomes.put(str(error))

    workers = [fork.Process(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    told = [outcomes.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert any(t != "fine" for t in told)


def _charge_until_killed(address, pipe, statement, after):
    """Charges once, tells so, and is killed at the n-th statement of the second charge."""
    ledger = Ledger(**address)
    digest = ledger.digest(PARTS)
    ledger.charge(digest, ONE, Budget(1e9, 0))
    os.write(pipe, b"x")
    seen = 0

    def counted(real):
        def run(self, *args):
            nonlocal seen
            seen += 1
            if seen == statement and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            found = real(self, *args)
            if seen == statement:
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return run

    store = type(ledger._store)
    for name in ("execute", "execute_many", "commit"):
        setattr(store, name, counted(getattr(store, name)))
    ledger.charge(digest, ONE, Budget(1e9, 0))
    os.write(pipe, b"x")


@pytest.mark.parametrize("after", (False, True), ids=("before", "after"))
def test_a_kill_at_every_statement_loses_no_acknowledged_charge_and_spends_none_twice(address, after):
    ledger, statement, acknowledged = Ledger(**address), 0, 0
    digest = ledger.digest(PARTS)
    while True:
        statement += 1
        read, write = os.pipe()
        child = fork.Process(target=_charge_until_killed, args=(address, write, statement, after))
        child.start()
        os.close(write)
        child.join(60)
        told = len(os.read(read, 10))
        os.close(read)
        before, acknowledged = acknowledged, acknowledged + told
        recorded = ledger.charges(digest)  # the one that was killed may be there, whole
        assert acknowledged <= len(recorded) <= acknowledged + 1
        assert [c.number_of_releases for c in recorded] == list(range(1, len(recorded) + 1))
        assert len(ledger.entries()) == len(recorded)
        acknowledged = len(recorded)
        if child.exitcode == 0:
            assert told == 2 and acknowledged == before + 2
            break
    assert statement > 5  # each statement of a charge was one


def test_a_fork_opens_its_own_connection(address):
    ledger, results = Ledger(**address), fork.Queue()
    digest = ledger.digest(PARTS)
    ledger.charge(digest, ONE, Budget(9, 0))
    child = fork.Process(
        target=lambda: results.put(ledger.charge(digest, ONE, Budget(9, 0)).number_of_releases), daemon=True
    )
    child.start()
    assert results.get(timeout=60) == 2
    child.join(60)
    assert ledger.charge(digest, ONE, Budget(9, 0)).number_of_releases == 3


def test_a_lock_that_is_held_is_an_error(address):
    holder = Ledger(**address)
    holder._store.reserve()
    try:
        with pytest.raises(LedgerError, match="locked by another process"):
            Ledger(**address, timeout=0.05)
    finally:
        holder._store.abort()
    assert Ledger(**address).entries() == ()


def test_threads_share_one(address):
    one, two, won = Ledger(**address), Ledger(**address), []
    digest = one.digest(PARTS)

    def work(ledger):
        for _ in range(3):
            try:
                won.append(ledger.charge(digest, ONE, Budget(7, 0)).id)
            except BudgetExceededError:
                return

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in (one, two, one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(won)) == 7 and one.spent(digest, 0) == two.spent(digest, 0) == 7


# --- damage

EDITS = {
    "a smaller epsilon": "UPDATE dpx_charges SET spent_after = 0.5 WHERE seq = 2",
    "another context": "UPDATE dpx_charges SET digest = (SELECT digest FROM dpx_charges WHERE seq = 3) WHERE seq = 2",
    "other terms": "UPDATE dpx_terms SET body = replace(body, '\"delta\": 0.0', '\"delta\": 0.1')",
    "terms that are not there": "UPDATE dpx_charges SET terms = 99",
    "no terms": "UPDATE dpx_terms SET body = '{}'",
    "a charge that is gone": "DELETE FROM dpx_charges WHERE seq = 1",
    "the last charge gone": "DELETE FROM dpx_charges WHERE seq = 2",
    "two places swapped": "UPDATE dpx_charges SET seq = 10 - seq",
    "a smaller account": "UPDATE dpx_account SET charges = 2",
    "another format": "UPDATE dpx_account SET format = 'x'",
    "no account": "DELETE FROM dpx_account",
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_without_the_key_is_an_error(address, edit):
    ledger = Ledger(**address)
    digest, other = ledger.digest(PARTS), ledger.digest([b"other"])
    for name in (digest, digest, other):
        ledger.charge(name, ONE, Budget(9, 0))
    _raw(address, EDITS[edit])
    with pytest.raises(LedgerError, match="edited or damaged"):
        Ledger(**address).entries()
    if (
        edit != "another context"
    ):  # a name that was edited is seen by a whole read only, as when a ledger is opened
        with pytest.raises(LedgerError, match=r"edited or damaged|Charges are gone"):
            ledger.charge(digest, ONE, Budget(9, 0))


def test_foreign_missing_and_new_keys(address, tmp_path):
    ledger = Ledger(**address)
    ledger.charge(ledger.digest(PARTS), ONE, Budget(9, 0))
    key = ledger._store._key_path
    content = key.read_bytes()
    Ledger(f"sqlite:///{tmp_path / 'other.db'}", key=tmp_path / "other.key")
    shutil.copy(tmp_path / "other.key", key)
    with pytest.raises(LedgerError, match="belongs to another ledger"):
        Ledger(**address)
    key.unlink()
    with pytest.raises(LedgerError, match="key, is missing"):
        Ledger(**address)
    key.write_bytes(b"x")
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(**address)
    key.write_bytes(content)
    assert len(Ledger(**address).entries()) == 1


def test_an_older_copy_is_noticed_by_whoever_saw_a_newer_one(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    digest = ledger.digest(PARTS)
    shutil.copy(path, tmp_path / "old.db")
    ledger.charge(digest, ONE, Budget(9, 0))
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "old.db", path)
    with pytest.raises(LedgerError, match="old copy restored"):
        ledger.charge(digest, ONE, Budget(9, 0))


def test_an_older_copy_that_grew_again_is_noticed(tmp_path):
    """As many charges as were seen, of which one was charged by somebody else to something else."""
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    first, second, third = (ledger.digest([bytes([i])]) for i in range(3))
    ledger.charge(first, ONE, Budget(1, 0))
    shutil.copy(path, tmp_path / "old.db")
    ledger.charge(second, ONE, Budget(1, 0))
    for name in ("ledger.db-wal", "ledger.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.copy(tmp_path / "old.db", path)
    other = Ledger(f"sqlite:///{path}")
    for digest in (third, second):
        other.charge(digest, ONE, Budget(1, 0))
        with pytest.raises(LedgerError, match="old copy restored"):
            ledger.charge(ledger.digest([b"new"]), ONE, Budget(1, 0))


def test_a_file_that_is_gone_or_no_database(tmp_path):
    path = tmp_path / "ledger.db"
    ledger = Ledger(f"sqlite:///{path}")
    path.unlink()
    with pytest.raises(LedgerError, match="is gone"):
        ledger.entries()
    with pytest.raises(LedgerError, match="is gone"):
        Ledger(f"sqlite:///{path}")
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(LedgerError, match="edited or damaged"):
        Ledger(f"sqlite:///{path}")
    with pytest.raises(LedgerError, match="does not exist"):
        Ledger(f"sqlite:///{tmp_path / 'nowhere' / 'ledger.db'}")


def test_nothing_private_at_rest_and_modes(address, tmp_path):
    ledger = Ledger(**address)
    ledger.charge(ledger.digest(PARTS), ONE, Budget(9, 0))
    everything = str(_raw(address, "SELECT * FROM dpx_charges") + _raw(address, "SELECT * FROM dpx_terms"))
    assert "elephant" not in everything and ledger._store.key.hex() not in everything
    for file in tmp_path.iterdir():
        if file.suffix != ".lock":
            assert file.stat().st_mode & 0o077 == 0, file
        assert b"elephant" not in file.read_bytes()


def test_addresses_that_do_not_fit(tmp_path):
    with pytest.raises(ConfigError, match="needs key="):
        Ledger("postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(ConfigError, match="in a database only"):
        Ledger(tmp_path / "ledger.json", key=tmp_path / "key")
    with pytest.raises(ConfigError, match="no address"):
        Ledger("postgresql://[", key=tmp_path / "key")
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger("postgresql://nobody@127.0.0.1:1/none", key=tmp_path / "key", timeout=1)


def test_a_store_of_ones_own():
    from hf_dp_xattn.privacy.ledger_file import MemoryStore

    store = MemoryStore()
    ledger = Ledger(store)
    ledger.charge(ledger.digest(PARTS), ONE, Budget(9, 0))
    assert len(Ledger(store).entries()) == 1
