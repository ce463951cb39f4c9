"""Codes of many public texts: in chunks, on one progress bar, taken up again where a folder keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...errors import ConfigError
from .text_library import Encode

CHUNK = 64  # texts: what is lost where a run is broken off


def checked(codes: torch.Tensor, texts: int) -> torch.Tensor:
    """Codes [n, C] as float32 on the CPU.

    Raises:
        ConfigError: not one finite row of floats for each text.
    """
    if (
        not isinstance(codes, torch.Tensor)
        or codes.ndim != 2
        or len(codes) != texts
        or not codes.is_floating_point()
    ):
        raise ConfigError("An encoder takes a list of n strings and gives a float tensor [n, C].")
    codes = codes.detach().to("cpu", torch.float32)
    if not bool(codes.isfinite().all()):
        raise ConfigError(
            "The encoder gives NaN or Inf for a public text; leave that text out, or use another encoder."
        )
    return codes


def encode_chunks(
    texts: Sequence[str], encode: Encode, name: str, folder: Path | None
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Codes of each CHUNK of texts, in order, and whether they were made now.

    folder: keeps them, under a name of the texts and the encoder."""
    for start in range(0, len(texts), CHUNK):
        part = list(texts[start : start + CHUNK])
        kept = None if folder is None else folder / f"codes-{_digest(name, part)}.safetensors"
        found = None if kept is None else _read(kept, len(part))
        codes = checked(encode(part), len(part)) if found is None else found
        if found is None and kept is not None:
            _keep(codes, kept)
        yield codes, found is None


def _keep(codes: torch.Tensor, path: Path) -> None:
    """Raises ConfigError where the folder cannot be written, or the disk is full."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(".tmp")
        save_file({"codes": codes.contiguous()}, whole)
        whole.replace(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Codes of public texts cannot be kept in {path.parent.name!r} ({error}). Free some space, or choose another folder."
        ) from None


def _digest(name: str, texts: Sequence[str]) -> str:
    digest = hashlib.sha256(name.encode())
    for text in texts:
        written = text.encode()
        digest.update(len(written).to_bytes(8, "big") + written)
    return digest.hexdigest()[:24]


def _read(path: Path, texts: int) -> torch.Tensor | None:
    """What was kept; None where nothing was, or half a file."""
    try:
        codes = load_file(path)["codes"]
    except (OSError, KeyError, SafetensorError):
        return None
    return codes if len(codes) == texts else None
