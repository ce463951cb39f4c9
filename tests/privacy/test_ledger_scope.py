"""What composes in a ledger: charges of one unit, one relation and one grouping; and what an older file says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_dp_xattn.errors import BudgetExceededError, ConfigError, LedgerError
from hf_dp_xattn.privacy.accountant import PureEvent
from hf_dp_xattn.privacy.ledger import Budget, Ledger, Name
from hf_dp_xattn.privacy.ledger_file import mac

ONE = [PureEvent(1)]
GROUP = Budget(3.0, 0.0, "group", "replace_one")
ROW = Budget(3.0, 0.0, "row", "replace_one")


def as_version_1(path: Path) -> None:
    """Rewrites a ledger as the version before wrote it: no charge says how rows were grouped."""
    key = Ledger(path)._store.key
    body = json.loads(path.read_bytes())
    del body["checksum"]
    body["schema"] = "hf_dp_xattn.ledger/1"
    for charge in body["charges"]:
        del charge["grouping"]
    body["checksum"] = mac(key, b"checksum", json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps(body))


def test_charges_of_one_grouping_compose_and_of_two_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    digest, one, two = ledger.digest([b"text"]), ledger.grouping([b"a"]), ledger.grouping([b"b"])
    for _ in range(2):
        ledger.charge(Name(digest, one), ONE, GROUP)
    again = Ledger(tmp_path / "l")
    assert [c.grouping for c in again.entries()] == [one, one]
    for wrong in (Name(digest, two), Name(digest), digest):
        for call in (again.charge, again.check):
            with pytest.raises(ConfigError, match="another grouping"):
                call(wrong, ONE, GROUP)
    assert again.charge(Name(digest, one), ONE, GROUP).epsilon_after == 3.0
    with pytest.raises(BudgetExceededError):
        again.charge(Name(digest, one), ONE, GROUP)


def test_one_write_of_two_groupings_is_refused_whole() -> None:
    ledger = Ledger()
    digest = ledger.digest([b"text"])
    names = [Name(digest, ledger.grouping([part])) for part in (b"a", b"b")]
    with pytest.raises(ConfigError, match="another grouping"):
        ledger.charge_all([Name(ledger.digest([b"other"]), names[0].grouping), *names], ONE, GROUP)
    assert ledger.entries() == ()


@pytest.mark.parametrize("unit", ["row", "context"])
def test_rows_and_contexts_have_no_grouping(unit: str) -> None:
    ledger, budget = Ledger(), Budget(2.0, 0.0, unit, "replace_one")
    digest = ledger.digest([b"text"])
    assert ledger.charge(digest, ONE, budget).grouping is None
    assert ledger.charge(digest, ONE, budget).epsilon_after == 2.0


def test_the_name_of_a_grouping_is_no_name_of_a_context_and_keyed() -> None:
    ledger = Ledger()
    assert ledger.grouping([b"a"]) != ledger.digest([b"a"])
    assert ledger.grouping([b"a"]) != Ledger().grouping([b"a"])
    with pytest.raises(ConfigError):
        ledger.charge(Name(ledger.digest([b"text"]), Ledger().grouping([b"a"])), ONE, GROUP)


def test_a_file_of_version_1_opens_and_what_it_does_not_say_is_not_assumed(tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = Ledger(path)
    rows, groups, fresh = (ledger.digest([part]) for part in (b"rows", b"groups", b"new"))
    grouping = ledger.grouping([b"a"])
    ledger.charge(rows, ONE, ROW)
    ledger.charge(Name(groups, grouping), ONE, GROUP)
    as_version_1(path)
    old = Ledger(path)
    assert [c.grouping for c in old.entries()] == [None, None]
    assert old.charge(rows, ONE, ROW).epsilon_after == 2.0
    for name in (groups, Name(groups, grouping)):
        with pytest.raises(ConfigError, match="another grouping"):
            old.charge(name, ONE, GROUP)
    old.charge(Name(fresh, grouping), ONE, GROUP)
    assert json.loads(path.read_bytes())["schema"] == "hf_dp_xattn.ledger/2"
    assert [c.grouping for c in Ledger(path).entries()] == [None, None, None, grouping]


def test_a_file_of_an_unknown_version_does_not_open(tmp_path: Path) -> None:
    path = tmp_path / "l"
    Ledger(path)
    path.write_text(path.read_text().replace("ledger/2", "ledger/3"))
    with pytest.raises(LedgerError, match="schema"):
        Ledger(path)
