"""What both kinds of calibration share: two files, read strictly, a card, a folder or Hub repository.

*Schemas.* Since 2 the JSON has a checksum of its own (`sha256`) beside that of the tensors (`tensors_sha256`). Schema 1 had only the
latter, so that a changed digit of a clipping bound was believed. It is still read, with a warning: a release sets its noise for whatever
bound it reads and enforces that bound, so such a slip costs usefulness and no privacy. Load and save once to bring it up to date.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..artefacts import (
    CardOptions,
    PushOptions,
    card_file,
    card_options,
    dump_document,
    push_with_card,
    read_document,
    seal,
    unseal,
    write_files,
)
from ..errors import ConfigError
from .checks import check_keys

SCHEMA_VERSION = 2
UNSEALED_VERSION = 1  # without a checksum of the JSON itself
JSON_NAME = "dp_xattn_calibration.json"
TENSORS_NAME = "dp_xattn_calibration.safetensors"
Tensors = dict[str, torch.Tensor]
T = TypeVar("T")


def write_stored(folder: Path, header: dict[str, Any], tensors: Tensors) -> None:
    """Writes the two files; the JSON names the other's checksum and its own."""
    blob = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
    own = {
        "schema_version": SCHEMA_VERSION,
        **header,
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_files(folder, {TENSORS_NAME: blob, JSON_NAME: dump_document(seal(own))})


def read_header(folder: Path, keys: Collection[str], kind: str | None = None) -> dict[str, Any]:
    """The JSON, of either schema as one of the present one.

    Raises:
        ConfigError: it is missing, does not match its checksum, is of another schema or kind, or has unknown or missing keys.
    """
    header = read_document(folder / JSON_NAME, ConfigError)
    stated = header.get("schema_version")
    version = stated if type(stated) is int else None  # True is no version
    if version == UNSEALED_VERSION:
        warnings.warn(
            f"The calibration in {folder.name!r} is of schema {UNSEALED_VERSION}, whose JSON has no checksum of its own: a changed digit "
            "would not be noticed. Load and save it once to bring it up to date.",
            stacklevel=2,
        )
        header["tensors_sha256"] = header.pop("sha256", None)
    elif version == SCHEMA_VERSION:
        header = unseal(header, JSON_NAME, ConfigError)
    else:
        raise ConfigError(
            f"The calibration in {folder.name!r} has schema version {stated!r}, this package reads {UNSEALED_VERSION} and "
            f"{SCHEMA_VERSION}. Upgrade hf_dp_xattn, or calibrate again."
        )
    if kind is not None and header.get("kind") != kind:
        raise ConfigError(
            f"The calibration in {folder.name!r} is of kind {header.get('kind')!r}, expected {kind!r}."
        )
    check_keys(header, {"schema_version", "tensors_sha256", *keys}, JSON_NAME)
    return header


def read_stored(
    folder: Path, header: dict[str, Any], build: Callable[[Tensors], T], tensors_of: Callable[[T], Tensors]
) -> T:
    """What `build` makes of the tensors. Raises ConfigError on any that is missing, unknown or damaged, and where `build` fails."""
    payload = _read_tensors(folder / TENSORS_NAME, header["tensors_sha256"])
    try:
        tensors = load(payload)
        calibration = build(tensors)
        unknown = set(tensors) - set(tensors_of(calibration))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"The calibration in {folder.name!r} is incomplete or damaged ({type(error).__name__}). Download it again."
        ) from None
    if unknown:
        raise ConfigError(
            f"{TENSORS_NAME} holds unknown tensors: {', '.join(sorted(unknown))}. Upgrade hf_dp_xattn."
        )
    return calibration


def _read_tensors(path: Path, sha256: Any) -> bytes:
    """The file's bytes. Raises ConfigError where it is missing, or not the one that the JSON names."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path.name} cannot be read ({type(error).__name__}); the calibration is incomplete."
        ) from None
    if hashlib.sha256(payload).hexdigest() != sha256:
        raise ConfigError(
            f"{path.name} does not match its checksum: damaged, truncated, or of another version. Download it again."
        )
    return payload


class Shared:
    """Saving and pushing a calibration with its card."""

    def _write(self, folder: Path) -> None:
        """Writes the two files."""
        raise NotImplementedError

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Unpack[CardOptions]) -> Path:
        """Writes JSON + safetensors (no pickle) and a card; returns the folder.

        A README.md that somebody else wrote stays as it is. card: license, base_model, utility (`artefacts.CardOptions`).
        """
        from ..cards import calibration_card

        folder = Path(directory)
        calibration: Any = self
        text = calibration_card(calibration, card_options(card))
        self._write(folder)
        write_files(folder, card_file(folder, text))
        return folder

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Uploads the files of `save_pretrained` to a Hub repository; returns the commit's address.

        Raises:
            HubError: the upload failed, and the repository is as it was. ConfigError: unknown options.
        """
        return push_with_card(
            lambda folder, card: self.save_pretrained(folder, **card),
            repo_id,
            options,
            "Upload a DP attention calibration",
        )
