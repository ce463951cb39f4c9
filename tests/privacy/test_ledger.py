"""The ledger: races between processes, crashes at every step, damaged files, and what may not be at rest."""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time

import pytest
from filelock import FileLock
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import hf_dp_xattn.privacy.ledger_file as ledger_module
from hf_dp_xattn.errors import BudgetExceededError, ConfigError, LedgerError
from hf_dp_xattn.privacy.accountant import GaussianEvent, LaplaceEvent, PureEvent, epsilon_of
from hf_dp_xattn.privacy.ledger import Budget, Ledger

fork = multiprocessing.get_context("fork")
ONE = [PureEvent(1)]
PARTS = [b"a secret prompt about purple elephants"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.json"


# --- spending


@pytest.mark.parametrize("persistent", (True, False))
def test_charges_add_up_and_are_refused_beyond_the_budget(path, persistent):
    ledger = Ledger(path if persistent else None)
    assert ledger.persistent is persistent
    digest, other = ledger.digest(PARTS), ledger.digest([b"other"])
    for i in range(3):
        checked = ledger.check(digest, ONE, Budget(3, 0))
        charge = ledger.charge(digest, ONE, Budget(3, 0), note={"mechanism": "anchors"})
        assert (charge.epsilon_before, charge.epsilon_after, charge.number_of_releases) == (i, i + 1, i + 1)
        assert checked.epsilon_after == charge.epsilon_after and charge.events == tuple(ONE)
    for call in (ledger.check, ledger.charge):
        with pytest.raises(
            BudgetExceededError, match=r"3 is spent in 3 .* costs 1, together 4, of a budget of 3"
        ):
            call(digest, ONE, Budget(3, 0))
    assert ledger.spent(digest, 0) == 3 and ledger.spent(other, 0) == 0
    assert len(ledger.charges(digest)) == len(ledger.entries()) == 3
    ledger.charge(digest, ONE, Budget(4, 0))  # a larger budget admits more; a smaller one forgets nothing
    with pytest.raises(BudgetExceededError):
        ledger.charge(digest, [PureEvent(1)], Budget(0.5, 1e-5))
    assert ledger.spent(digest, 0) == 4
    ledger.charge(other, ONE, Budget(1, 0))


@pytest.mark.parametrize("persistent", (True, False))
def test_a_release_of_several_names_is_charged_to_all_or_none(path, persistent):
    ledger = Ledger(path if persistent else None)
    names = [ledger.digest([bytes([i])]) for i in range(4)]
    ledger.charge(names[3], ONE, Budget(1, 0))
    for call in (ledger.check_all, ledger.charge_all):
        for several in (names, [names[0], names[0]]):  # one of them, or one of them twice, is too much
            with pytest.raises(BudgetExceededError):
                call(several, ONE, Budget(1, 0))
    assert len(ledger.entries()) == 1 and ledger.check_all(names[:3], ONE, Budget(1, 0))[2].epsilon_after == 1
    made = ledger.charge_all(names[:3], ONE, Budget(1, 0), note={"horizon": 3})
    assert [c.digest for c in made] == names[:3] and ledger.entries()[1:] == made
    twice = ledger.charge_all([names[0], names[0]], ONE, Budget(3, 0))
    assert [c.number_of_releases for c in twice] == [2, 3]
    assert ledger.most(names, 0) == (3, 3) and ledger.most(names[1:], 0) == (1, 1)
    assert ledger.most([], 0) == ledger.most([ledger.digest([b"new"])], 0) == (0, 0)


def test_a_crash_charges_several_names_or_none(path, monkeypatch):
    ledger = Ledger(path)
    names = [ledger.digest([bytes([i])]) for i in range(5)]
    for function, nth in STEPS[:3]:
        with monkeypatch.context() as patch:
            _crash_at(patch, function, nth)
            with pytest.raises(_Crash):
                ledger.charge_all(names, ONE, Budget(9, 0))
        assert len({Ledger(path).spent(n, 0) for n in names}) == 1


def test_gaussian_spending_is_infinite_at_delta_zero():
    ledger = Ledger()
    digest = ledger.digest(PARTS)
    ledger.charge(digest, [GaussianEvent(1, 4)], Budget(8, 1e-5))
    assert ledger.spent(digest, 0) == float("inf")
    with pytest.raises(BudgetExceededError):
        ledger.charge(digest, ONE, Budget(100, 0))


def test_units_and_relations_do_not_mix():
    ledger = Ledger()
    digest = ledger.digest(PARTS)
    charge = ledger.charge(digest, ONE, Budget(9, 0, "row", "replace_one"))
    assert (charge.unit, charge.neighboring) == ("row", "replace_one")
    for scope in (("context", "replace_one"), ("row", "add_or_remove_one"), ()):
        with pytest.raises(ConfigError, match="do not compose"):
            ledger.charge(digest, ONE, Budget(9, 0, *scope))
    ledger.charge(digest, ONE, Budget(9, 0, "row", "replace_one"))


@pytest.mark.slow
@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.lists(
        st.one_of(
            st.builds(GaussianEvent, st.integers(1, 9), st.integers(1, 1000)),
            st.builds(LaplaceEvent, st.integers(1, 9), st.integers(2, 100)),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from((1e-9, 1e-5, 1e-2)),
)
def test_never_understates_dp_accounting(events, delta):
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    from hf_dp_xattn.privacy.accountant import ORDERS, pure_epsilon, to_dp_event

    ledger, budget, accepted = Ledger(), Budget(10, delta), []
    digest = ledger.digest(PARTS)
    for event in events:
        try:
            ledger.charge(digest, [event], budget)
            accepted.append(event)
        except BudgetExceededError:
            assert epsilon_of([*accepted, event], delta) > 10
    accountant = RdpAccountant(ORDERS, NeighboringRelation.REPLACE_ONE)
    theirs = accountant.compose(to_dp_event(accepted, pure_as="randomized_response")).get_epsilon(delta)
    if not any(isinstance(e, GaussianEvent) for e in accepted):
        theirs = min(theirs, float(sum(map(pure_epsilon, accepted))))
    assert theirs * (1 - 1e-9) <= ledger.spent(digest, delta) <= 10 * (1 + 1e-9)


# --- races


def _spend(path, ready, results, tries):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    ready.wait()
    won = 0
    for _ in range(tries):
        try:
            ledger.charge(digest, ONE, Budget(7, 0))
            won += 1
        except BudgetExceededError:
            pass
    results.put(won)


def _race(path, processes=8, tries=2):
    Ledger(path)
    ready, results = fork.Barrier(processes), fork.Queue()
    workers = [fork.Process(target=_spend, args=(path, ready, results, tries)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    won = sum(results.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join(60)
    return won


def test_processes_racing_for_seven_releases_get_exactly_seven(path):
    assert _race(path) == 7
    assert len(Ledger(path).entries()) == 7


class _NoLock:
    def __init__(self, *_, **__):
        pass

    def acquire(self):
        pass

    release = acquire


def test_the_race_catches_a_ledger_without_a_lock(path, monkeypatch):
    """Power: without the lock the same race admits more than seven releases."""
    real_write = ledger_module.write_whole
    monkeypatch.setattr(ledger_module, "FileLock", _NoLock)

    def slow_write(target, content):  # widens the window between read and write; own file: no clash of names
        time.sleep(0.02)
        own = target.with_name(f"{target.name}.{os.getpid()}")
        own.write_bytes(content)
        os.replace(own, target)

    Ledger(path)
    monkeypatch.setattr(ledger_module, "write_whole", slow_write)
    monkeypatch.setattr(
        ledger_module.FileStore, "_seen", property(lambda self: (), lambda self, value: None), raising=False
    )
    assert _race(path) > 7
    monkeypatch.setattr(ledger_module, "write_whole", real_write)


def test_threads_and_two_objects_share_one_file(path):
    one, two = Ledger(path), Ledger(path)
    digest, won = one.digest(PARTS), []
    assert digest == two.digest(PARTS)

    def work(ledger):
        for _ in range(3):
            with contextlib.suppress(BudgetExceededError):
                won.append(ledger.charge(digest, ONE, Budget(7, 0)).id)

    threads = [threading.Thread(target=work, args=(ledger,)) for ledger in (one, two, one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(won)) == 7 and one.spent(digest, 0) == two.spent(digest, 0) == 7


def _in_child(ledger, digest, results):
    try:
        results.put(ledger.charge(digest, ONE, Budget(9, 0)).number_of_releases)
    except LedgerError as error:
        results.put(str(error))


@pytest.mark.parametrize("persistent", (True, False))
def test_fork(path, persistent):
    ledger, results = Ledger(path if persistent else None), fork.Queue()
    digest = ledger.digest(PARTS)
    with ledger._store.lock:  # a thread of the parent may hold it while another one forks
        child = fork.Process(target=_in_child, args=(ledger, digest, results))
        child.start()
        got = results.get(timeout=30)
        child.join(30)
    assert got == 1 if persistent else "in-memory" in got
    assert ledger.spent(digest, 0) == (1 if persistent else 0)


def test_a_lock_that_is_held_is_an_error(path):
    Ledger(path)
    with FileLock(str(path) + ".lock"), pytest.raises(LedgerError, match="locked"):
        Ledger(path, timeout=0.1)


# --- crashes


class _Crash(BaseException):
    pass


def _crash_at(monkeypatch, function, nth):
    real, calls = getattr(os, function), []

    def crashing(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise _Crash
        return real(*args, **kwargs)

    monkeypatch.setattr(os, function, crashing)


STEPS = [("fsync", 1), ("fsync", 2), ("replace", 1), ("open", 1)]


@pytest.mark.parametrize(("function", "nth"), STEPS)
def test_crash_in_a_charge_leaves_the_old_or_the_new_state(path, monkeypatch, function, nth):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    ledger.charge(digest, ONE, Budget(9, 0))
    with monkeypatch.context() as patch:
        if function == "open":
            patch.setattr(ledger_module.os, "fdopen", lambda *a, **k: (_ for _ in ()).throw(_Crash()))
        else:
            _crash_at(patch, function, nth)
        with pytest.raises(_Crash):
            ledger.charge(digest, ONE, Budget(9, 0))
    spent = Ledger(path).spent(digest, 0)
    assert spent == (2 if (function, nth) == ("fsync", 2) else 1)
    ledger.charge(digest, ONE, Budget(9, 0))
    assert Ledger(path).spent(digest, 0) == spent + 1


@pytest.mark.parametrize(
    ("function", "nth"), [("fsync", n) for n in range(1, 7)] + [("replace", n) for n in (1, 2, 3)]
)
def test_crash_in_the_creation_can_be_resumed(path, monkeypatch, function, nth):
    with monkeypatch.context() as patch:
        _crash_at(patch, function, nth)
        with pytest.raises(_Crash):
            Ledger(path)
    ledger = Ledger(path)
    ledger.charge(ledger.digest(PARTS), ONE, Budget(1, 0))
    assert len(Ledger(path).entries()) == 1


def _charge_and_acknowledge(path, pipe, early):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    for _ in range(10_000):
        if early:  # the planted fault: acknowledges ("computes") before the charge is on disk
            os.write(pipe, b"x")
            time.sleep(0.002)
        ledger.charge(digest, ONE, Budget(1e9, 0))
        if not early:
            os.write(pipe, b"x")


def _kill_in_the_loop(path, early, wanted):
    read, write = os.pipe()
    child = fork.Process(target=_charge_and_acknowledge, args=(path, write, early))
    child.start()
    os.close(write)
    acknowledged = 0
    while acknowledged < wanted:
        acknowledged += len(os.read(read, 1))
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    while more := os.read(read, 1000):
        acknowledged += len(more)
    os.close(read)
    return acknowledged, len(Ledger(path).entries())


def test_kill_loses_no_acknowledged_charge(tmp_path):
    for i, wanted in enumerate((1, 3, 7, 12, 20)):
        acknowledged, recorded = _kill_in_the_loop(tmp_path / str(i), False, wanted)
        assert acknowledged <= recorded <= acknowledged + 1


def test_the_kill_catches_a_caller_that_computes_before_it_charges(tmp_path):
    """Power: killed after an early acknowledgement, the file holds too few charges."""
    outcomes = [_kill_in_the_loop(tmp_path / str(i), True, 3) for i in range(5)]
    assert any(recorded < acknowledged for acknowledged, recorded in outcomes)


# --- damaged and foreign files


def _edit(**changes):
    def edit(raw):
        return json.dumps(json.loads(raw) | changes).encode()

    return edit


def _cheaper(raw):
    return raw.replace(b'"epsilon": "1"', b'"epsilon": "1/100"')


DAMAGES = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "not utf-8": lambda raw: b"\xff" + raw,
    "list": lambda raw: b"[]",
    "other schema": _edit(schema="hf_dp_xattn.ledger/3"),
    "unknown field": _edit(more=1),
    "charges dropped": _edit(charges=[]),
    "checksum": _edit(checksum="0" * 64),
    "cheaper": _cheaper,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_an_error_and_nothing_is_overwritten(path, damage):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    ledger.charge(digest, ONE, Budget(9, 0))
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    for call in (lambda: Ledger(path), lambda: ledger.charge(digest, ONE, Budget(9, 0)), ledger.entries):
        with pytest.raises(LedgerError):
            call()
    assert path.read_bytes() == damaged


def test_missing_or_foreign_key_missing_ledger_and_directory(path, tmp_path):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    key_path = path.with_name(path.name + ".key")
    key = key_path.read_bytes()
    other = Ledger(tmp_path / "other")
    with pytest.raises(ConfigError, match="another ledger"):
        ledger.charge(other.digest(PARTS), ONE, Budget(9, 0))
    for content in (None, b"", b"rubbish\n", (tmp_path / "other.key").read_bytes()):
        key_path.unlink(missing_ok=True)
        if content is not None:
            key_path.write_bytes(content)
        with pytest.raises(LedgerError):
            Ledger(path)
        assert key_path.exists() is (content is not None)
    key_path.write_bytes(key)
    assert Ledger(path).digest(PARTS) == digest
    old = path.read_bytes()
    path.unlink()
    with pytest.raises(LedgerError, match="gone"):
        Ledger(path)
    assert not path.exists()
    path.write_bytes(old)
    ledger.charge(digest, ONE, Budget(9, 0))
    path.write_bytes(old)
    with pytest.raises(LedgerError, match="old copy"):
        ledger.charge(digest, ONE, Budget(9, 0))
    with pytest.raises(LedgerError, match="directory"):
        Ledger(tmp_path / "no" / "ledger")


def test_links_do_not_make_two_ledgers_of_one(path, tmp_path):
    ledger = Ledger(path)
    (tmp_path / "soft").symlink_to(path)
    soft = Ledger(tmp_path / "soft")
    soft.charge(soft.digest(PARTS), ONE, Budget(1, 0))
    assert ledger.spent(ledger.digest(PARTS), 0) == 1
    os.link(path, tmp_path / "hard")
    with pytest.raises(LedgerError, match="hard link"):
        ledger.entries()


# --- what is at rest


def test_nothing_private_at_rest(path, tmp_path):
    ledger = Ledger(path)
    digest = ledger.digest(PARTS)
    ledger.charge(digest, ONE, Budget(9, 0), note={"mechanism": "anchors"})
    key = path.with_name(path.name + ".key").read_text().split()[-1]
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file.name
        content = file.read_bytes()
        assert b"elephant" not in content and b"secret" not in content
        assert file.suffix == ".key" or key.encode() not in content
    assert key not in repr(ledger) + repr(ledger.entries()) and ledger._store.key.hex() == key
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(LedgerError, match="pickled"):
            call(ledger)


def test_digest_is_keyed_and_injective(tmp_path):
    one, two = Ledger(), Ledger(tmp_path / "two")
    lists = (
        [],
        [b""],
        [b"", b""],
        [b"ab"],
        [b"a", b"b"],
        [b"", b"ab"],
        [b"a" * 8],
        [(1).to_bytes(8, "big") + b"a"],
    )
    assert len({one.digest(parts) for parts in lists}) == len(lists)
    assert one.digest([b"a"]) == one.digest([bytearray(b"a")]) != two.digest([b"a"])
    for bad in (b"ab", "ab", ["ab"], [1]):
        with pytest.raises(ConfigError):
            one.digest(bad)


def test_invalid_arguments_spend_nothing():
    ledger = Ledger()
    digest = ledger.digest(PARTS)
    for args, note in (
        ((digest, [], Budget(1, 0)), {}),
        ((digest, ["event"], Budget(1, 0)), {}),
        (("a secret prompt", ONE, Budget(1, 0)), {}),
        ((digest.upper(), ONE, Budget(1, 0)), {}),
        ((digest, ONE, Budget(1, 0)), {"rows": [1, 2]}),
        ((digest, ONE, Budget(1, 0)), {"x": float("nan")}),
        ((digest, ONE, Budget(1, 0)), {"text": "x" * 201}),
    ):
        with pytest.raises(ConfigError) as caught:
            ledger.charge(*args, note=note)
        assert "secret" not in str(caught.value)
    assert ledger.entries() == ()
    inf, nan = float("inf"), float("nan")
    for bad in ((0, 0), (-1, 0), (inf, 0), (nan, 0), (1, 1), (1, -0.1), (1, nan), (True, 0), (1, 0, "word")):
        with pytest.raises(ConfigError):
            Budget(*bad)
