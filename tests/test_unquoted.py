"""What another code's error says is gone: no cause, and no context."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_dp_xattn.errors import ConfigError, ContextError
from hf_dp_xattn.records import read_records
from hf_dp_xattn.unquoted import unquoted


def _fails() -> int:
    raise ValueError("a secret")


def test_the_words_are_gone() -> None:
    with pytest.raises(ContextError, match=r"^ValueError$") as caught:
        unquoted(_fails, ContextError)
    assert caught.value.__context__ is None and caught.value.__cause__ is None
    with pytest.raises(ValueError, match="secret"):
        unquoted(_fails, ContextError, (OSError,))
    assert unquoted(lambda: 5, ContextError) == 5


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"secret \xff")
    with pytest.raises(ConfigError, match="UnicodeDecodeError") as caught:
        read_records(str(tmp_path / "file"), "--texts")
    assert caught.value.__context__ is None  # it would hold the bytes
