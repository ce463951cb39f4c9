"""JSON documents that are read strictly: what is ambiguous, truncated or not a number is an error, never a guess."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DPXAttnError


def dump_document(values: Mapping[str, Any]) -> bytes:
    """JSON for people and programs: sorted keys, no NaN, a final line break."""
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def canonical_sha256(values: Mapping[str, Any]) -> str:
    """Digest of a document's content, whatever its layout."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own checksum, `sha256`, over everything else in it."""
    read = json.loads(dump_document(values))  # as a reader will see it: lists for tuples, keys as strings
    return {**read, "sha256": canonical_sha256(read)}


def unseal(values: Mapping[str, Any], name: str, error: type[DPXAttnError]) -> dict[str, Any]:
    """The document without its checksum.

    Raises:
        error: the checksum is missing or does not match: a changed digit, though it be valid JSON, is not believed.
    """
    content = {k: v for k, v in values.items() if k != "sha256"}
    if canonical_sha256(content) != values.get("sha256"):
        raise error(
            f"{name} does not match its own checksum: it was edited or damaged. Download it again, or save anew what it was saved from."
        )
    return content


def _no_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > 19:  # beyond 64 bits
        raise ValueError("a number is too large")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number is too large")
    return value


def read_document(path: Path, error: type[DPXAttnError]) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        error: there is no such file; it is not JSON (damaged, truncated), holds NaN, a number that no machine
            holds, or a key twice, or is no object.
    """
    try:
        values = json.loads(
            path.read_bytes().decode(),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
            parse_int=_integer,
            parse_float=_float,
        )
    except FileNotFoundError:
        raise error(
            f"No {path.name} in {path.parent.name!r}: not what was looked for, or incomplete."
        ) from None
    except OSError as cause:
        raise error(f"{path.name} cannot be read ({type(cause).__name__}).") from None
    except (ValueError, RecursionError) as cause:
        why = f"line {cause.lineno}" if isinstance(cause, json.JSONDecodeError) else type(cause).__name__
        if type(cause) is ValueError:
            why = str(cause)
        raise error(
            f"{path.name} is not valid JSON ({why}); it may be damaged or truncated. Download or save it again."
        ) from None
    if not isinstance(values, dict):
        raise error(f"{path.name} must hold a JSON object.")
    return values


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes each file whole or not at all, in order: put the one that states the others' checksums last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
