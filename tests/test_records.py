"""Where texts are cut, what is no part of their name, and bytes that are no text."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hf_dp_xattn.errors import ConfigError
from hf_dp_xattn.records import decode_text, plain_text, read_records, records_of

SEPARATORS = "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts too
MARK = "\ufeff"
words = st.text("ab \t.é" + SEPARATORS, min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(words, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_a_line_is_one_record_whatever_stands_in_it(records: list[str], end: str) -> None:
    data = "".join(record + end for record in records).encode()
    assert records_of(decode_text(data)) == records


@pytest.mark.parametrize("separator", SEPARATORS)
def test_splitlines_would_cut_it(separator: str) -> None:
    """Power: each of these is one that a library function takes for a line end."""
    record = f"the code of{separator}the vault"
    assert len(record.splitlines()) == 2 and records_of(record) == [record]


@given(st.text("a\r\n\ufeff ", max_size=12))
def test_a_plain_text_stays_what_it_is(text: str) -> None:
    found = plain_text(text)
    assert plain_text(found) == found and "\r\n" not in found
    assert plain_text(text.replace("\n", "\r\n")) == found


@given(st.lists(words, min_size=1, max_size=5))
def test_a_byte_order_mark_gives_no_second_name(records: list[str]) -> None:
    text = "\n".join(records)
    marked = "\n".join(MARK + record for record in records)  # files that were joined
    assert plain_text(MARK + text) == plain_text(marked) == text
    assert decode_text((MARK + text).encode()) == decode_text(text.encode())
    assert records_of(marked) == records


def test_a_lone_surrogate_is_no_reason_to_refuse_a_text() -> None:
    found = plain_text("a \ud800b\udfff \U0001f600")
    assert found == "a \ufffdb\ufffd \U0001f600" and found.encode()


def test_the_rest_of_a_text_stays() -> None:
    assert plain_text(f"a{MARK}b\n c") == f"a{MARK}b\n c"
    assert plain_text("é") != plain_text("e\u0301")  # other tokens: another context, see docs/sharp-edges.md


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "texts"
    for data in (b"caf\xe9", b"\n \n", MARK.encode()):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="--public") as caught:
            read_records(str(path), "--public")
        assert "caf" not in str(caught.value)
    path.write_bytes(f"{MARK}one\r\n\r\n two\x0c2 \r\n".encode())
    assert read_records(str(path), "--public") == ["one", "two\x0c2"]
