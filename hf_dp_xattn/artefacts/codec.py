"""An artefact as two files: JSON for what a person reads, safetensors for the rest. No pickle.

The JSON states its schema, the tensors' checksum (`tensors_sha256`) and its own (`sha256`): a changed digit is noticed. They guard against
damage, not against a publisher who lies. What is unknown or missing is refused, keys and tensors alike.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..errors import DPXAttnError
from .card import CardOptions, card_file, card_options
from .checks import Checks
from .documents import dump_document, read_document, seal, unseal, write_files
from .shareable import Shareable

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Codec:
    """The files of one kind of artefact.

    Args:
        checks: the kind's word and class of errors.
        stem: of the files' names.
        schema: what is written and read.
        schema_key: where the JSON says it.
        older: schemas that are read as well.
    """

    checks: Checks
    stem: str
    schema: str | int
    schema_key: str = "schema"
    older: tuple[str | int, ...] = ()

    @property
    def json_name(self) -> str:
        return f"{self.stem}.json"

    @property
    def tensors_name(self) -> str:
        return f"{self.stem}.safetensors"

    @property
    def names(self) -> tuple[str, str]:
        """Of both files."""
        return self.json_name, self.tensors_name

    def encode_document(self, header: Mapping[str, Any]) -> bytes:
        """The JSON, with its schema and checksum."""
        return dump_document(seal({self.schema_key: self.schema, **header}))

    def encode(self, header: Mapping[str, Any], tensors: Tensors) -> dict[str, bytes]:
        """Both files by name; the JSON, which states the other's checksum, last. Without tensors there is no other."""
        if not tensors:
            return {self.json_name: self.encode_document({**header, "tensors_sha256": None})}
        blob = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()})
        document = {**header, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
        return {self.tensors_name: blob, self.json_name: self.encode_document(document)}

    def read_document(self, folder: Path) -> dict[str, Any]:
        """The JSON without its checksum; of a schema that is read, and undamaged."""
        values = read_document(folder / self.json_name, self.checks.error)
        schema = values.get(self.schema_key)
        if not any(type(schema) is type(s) and schema == s for s in (self.schema, *self.older)):
            raise self.checks.error(
                f"The {self.checks.word} in {folder.name!r} has {self.schema_key.replace('_', ' ')} {schema!r}, this package reads "
                f"{self.schema!r}: {self.checks.again}, or upgrade hf_dp_xattn where the file is newer."
            )
        return unseal(values, self.json_name, self.checks.error)

    def read_tensors(self, folder: Path, sha256: Any) -> bytes:
        """The other file's bytes, which are the ones that the JSON names."""
        try:
            blob = (folder / self.tensors_name).read_bytes()
        except OSError as error:
            raise self.checks.error(
                f"{self.tensors_name} cannot be read ({type(error).__name__}); the {self.checks.word} in {folder.name!r} is incomplete."
            ) from None
        if hashlib.sha256(blob).hexdigest() != sha256:
            raise self.checks.error(
                f"{self.tensors_name} does not have the checksum that {self.json_name} states: damaged, truncated, or of another "
                f"{self.checks.word}. Download it again."
            )
        return blob


class Encoded(Shareable):
    """An artefact whose files a `Codec` writes and reads.

    KEYS: of the JSON, besides schema and checksums; OPTIONAL: those that older files lack. KIND: what "kind" is there, if it has one.
    """

    CODEC: ClassVar[Codec]
    KEYS: ClassVar[frozenset[str]]
    OPTIONAL: ClassVar[frozenset[str]] = frozenset()
    KIND: ClassVar[str | None] = None

    @abstractmethod
    def header(self) -> dict[str, Any]:
        """What the JSON says, besides the schema and the checksums."""

    @abstractmethod
    def tensors(self) -> Tensors:
        """All tensors by the names that they have in the file, in the precision that they are stored in."""

    @classmethod
    @abstractmethod
    def from_parts(cls, header: Mapping[str, Any], tensors: Tensors) -> Self:
        """The artefact of a file's parts. Raises what a missing or odd part makes it raise.

        Args:
            header: of the JSON file.
            tensors: of the safetensors file, by name.
        """

    @abstractmethod
    def verify(self) -> None:
        """Refuses parts that do not fit each other."""

    def files(self) -> dict[str, bytes]:
        return self.CODEC.encode(self.header(), self.tensors())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads and checks the files in a local folder.

        Raises:
            ConfigError or ReleaseError, by the kind of artefact: anything is missing, unknown, damaged or of another schema.
        """
        codec, checks = cls.CODEC, cls.CODEC.checks
        header = codec.read_document(folder)
        if cls.KIND is not None and header.get("kind") != cls.KIND:
            raise checks.error(
                f"The {checks.word} in {folder.name!r} is of kind {header.get('kind')!r}, expected {cls.KIND!r}."
            )
        known = {codec.schema_key, "tensors_sha256", *cls.KEYS}
        checks.keys(header, known, codec.json_name, optional=cls.OPTIONAL)
        written = header["tensors_sha256"]
        blob = None if written is None else codec.read_tensors(folder, written)
        try:
            tensors = {} if blob is None else load(blob)
            artefact = cls.from_parts(header, tensors)
            artefact.verify()
            unknown = set(tensors) - set(artefact.tensors())
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, checks.error):
                raise
            why = f": {error}" if isinstance(error, DPXAttnError) else ""
            raise checks.error(
                f"The {checks.word} in {folder.name!r} is incomplete or damaged ({type(error).__name__}{why}). Download it again."
            ) from None
        if unknown:
            raise checks.error(
                f"{codec.tensors_name} holds unknown tensors: {', '.join(sorted(unknown))}. Upgrade hf_dp_xattn."
            )
        return artefact

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Unpack[CardOptions]) -> Path:
        """Writes JSON + safetensors (no pickle) and a card.

        A README.md that somebody else wrote stays as it is.

        Args:
            directory: made if needed.
            card: license, base_model, utility, repo_id (`artefacts.CardOptions`).

        Returns:
            The folder.
        """
        folder = Path(directory)
        files = self.files()
        write_files(folder, {**files, **card_file(folder, self.card(card_options(card)))})
        return folder
