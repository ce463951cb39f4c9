"""What both kinds of calibration share: two files, read strictly, a card, a folder or Hub repository.

JSON for what a person reads, with a checksum of its own (`sha256`) and that of the tensors (`tensors_sha256`); safetensors for the rest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

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
from .calibration_card import Described, calibration_card
from .checks import check_keys

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SCHEMA_VERSION = 2
JSON_NAME = "dp_xattn_calibration.json"
TENSORS_NAME = "dp_xattn_calibration.safetensors"
Tensors = dict[str, torch.Tensor]


def read_header(folder: Path) -> dict[str, Any]:
    """The JSON.

    Raises:
        ConfigError: it is missing, of another schema, or does not match its checksum.
    """
    header = read_document(folder / JSON_NAME, ConfigError)
    version = header.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:  # True is no version
        raise ConfigError(
            f"The calibration in {folder.name!r} has schema version {version!r}, this package reads {SCHEMA_VERSION}: calibrate again, or "
            "upgrade hf_dp_xattn where the file is newer."
        )
    return unseal(header, JSON_NAME, ConfigError)


class Stored:
    """A calibration of one kind, on disk and on the Hub. HEADER: its keys of the JSON; KIND: what "kind" is there, if it has one.

    mechanism: whose releases it serves.
    """

    mechanism: ClassVar[str]
    HEADER: ClassVar[frozenset[str]]
    KIND: ClassVar[str | None] = None

    def header(self) -> dict[str, Any]:
        """What the JSON says, besides the schema and the checksums."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """All tensors by the names that they have in the file, in the precision that they are stored in."""
        raise NotImplementedError

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> Self:
        """The calibration of a file's parts. Raises what a missing or odd part makes it raise."""
        raise NotImplementedError

    def verify(self) -> None:
        """Raises ConfigError for parts that do not fit each other."""
        raise NotImplementedError

    def described(self) -> Described:
        """What its card says of it."""
        raise NotImplementedError

    def card(self, options: CardOptions) -> ModelCard:
        """Its card, with what only the publisher knows."""
        return calibration_card(self.described(), options)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the files in a local folder; raises ConfigError on anything missing, unknown, damaged or of another schema."""
        header = read_header(folder)
        if cls.KIND is not None and header.get("kind") != cls.KIND:
            raise ConfigError(
                f"The calibration in {folder.name!r} is of kind {header.get('kind')!r}, expected {cls.KIND!r}."
            )
        check_keys(header, {"schema_version", "tensors_sha256", *cls.HEADER}, JSON_NAME)
        payload = _read_tensors(folder / TENSORS_NAME, header["tensors_sha256"])
        try:
            tensors = load(payload)
            calibration = cls.from_parts(header, tensors)
            calibration.verify()
            unknown = set(tensors) - set(calibration.tensors())
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

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Unpack[CardOptions]) -> Path:
        """Writes JSON + safetensors (no pickle) and a card; returns the folder.

        A README.md that somebody else wrote stays as it is. card: license, base_model, utility (`artefacts.CardOptions`).
        """
        folder = Path(directory)
        text = self.card(card_options(card))
        blob = save({k: v.detach().cpu().contiguous().clone() for k, v in self.tensors().items()})
        header = {
            "schema_version": SCHEMA_VERSION,
            **self.header(),
            "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        }
        write_files(folder, {TENSORS_NAME: blob, JSON_NAME: dump_document(seal(header))})
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
