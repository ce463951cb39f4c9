"""The protection of a saved pipeline or model: `dp_xattn/` beside the host's own files. Config, calibration, budget, card; all public."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..artefacts import CardOptions, Found, HubOptions, card_file, locate, write_files
from ..artefacts.checks import Checks
from ..artefacts.codec import Codec
from ..calibration.kinds import load_calibration
from ..calibration.stored import CODEC as CALIBRATION
from ..calibration.stored import Stored
from ..config import CONFIG_NAME, DPXAttnConfig
from ..errors import ConfigError
from ..privacy.ledger import Budget
from .protection_card import protection_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

FOLDER = "dp_xattn"
SCHEMA = "hf_dp_xattn.protection/2"  # 1 had no checksum of its own, and the budget stands in it
CHECKS = Checks("protection", ConfigError, "save it anew")
CODEC = Codec(CHECKS, "dp_xattn_protection", SCHEMA)
PROTECTION_NAME = CODEC.json_name
_KEYS = {"schema", "host", "pipeline", "budget", "public", "not_covered", "files"}


@dataclass(frozen=True, eq=False)
class Protection:
    """What stands in `dp_xattn/`.

    host, pipeline: the classes of the model and of the pipeline that was saved, if it was one. public, not_covered: of the report.
    """

    config: DPXAttnConfig
    calibration: Stored | None
    budget: Budget
    host: str
    pipeline: str | None
    public: tuple[str, ...]
    not_covered: tuple[str, ...]

    def card(self, options: CardOptions) -> ModelCard:
        """Its card, with what only the publisher knows."""
        described = None if self.calibration is None else self.calibration.described()
        return protection_card(self.config, self.budget, described, self.public, self.not_covered, options)

    def save(self, directory: Path) -> Path:
        """Writes `dp_xattn/` into a host's folder; returns it."""
        folder = directory / FOLDER
        for name in (PROTECTION_NAME, *CALIBRATION.names):  # of an earlier save
            (folder / name).unlink(missing_ok=True)
        files = {**self.config.files(), **({} if self.calibration is None else self.calibration.files())}
        document = {
            "host": self.host,
            "pipeline": self.pipeline,
            "budget": asdict(self.budget),
            "public": self.public,
            "not_covered": self.not_covered,
            "files": {name: _sha256(content) for name, content in files.items()},
        }
        card = card_file(folder, self.card({}))
        write_files(folder, {**files, **card, PROTECTION_NAME: CODEC.encode_document(document)})
        return folder


def locate_protection(name_or_path: str | Path, **where: Unpack[HubOptions]) -> Found:
    """The folder with a protection's files, all of one commit. Raises ConfigError where there is none."""
    subfolder = where.pop("subfolder", None)
    beside = FOLDER if subfolder is None else f"{subfolder}/{FOLDER}"
    try:
        located = locate(
            name_or_path, (PROTECTION_NAME, CONFIG_NAME), error=ConfigError, subfolder=beside, **where
        )
        document = _read(located.folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A protected host's save_pretrained writes a folder {FOLDER}/ beside the model; protect a plain one with dpx.protect."
        ) from None
    if located.commit is not None and CALIBRATION.json_name in document["files"]:
        where["revision"] = located.commit
        locate(name_or_path, CALIBRATION.names, error=ConfigError, subfolder=beside, **where)
    return located


def read_protection(folder: Path) -> Protection:
    """Reads and checks all of it; raises ConfigError."""
    document = _read(folder)
    for name, digest in document["files"].items():
        path = folder / name
        if not path.is_file() or _sha256(path.read_bytes()) != digest:
            raise ConfigError(
                f"{name} is missing or does not have the checksum that {PROTECTION_NAME} states. Download or save the folder again."
            )
    calibrated = CALIBRATION.json_name in document["files"]
    pipeline = document["pipeline"]
    return Protection(
        config=DPXAttnConfig.from_file(folder),
        calibration=load_calibration(folder) if calibrated else None,
        budget=Budget(**document["budget"]),
        host=CHECKS.name(document["host"], "the class of the host"),
        pipeline=None if pipeline is None else CHECKS.name(pipeline, "the class of the pipeline"),
        public=CHECKS.texts(document["public"], "what is public"),
        not_covered=CHECKS.texts(document["not_covered"], "what is not covered"),
    )


def _read(folder: Path) -> dict[str, Any]:
    document = CODEC.read_document(folder)
    CHECKS.keys(document, _KEYS, PROTECTION_NAME)
    CHECKS.keys(document["budget"], {f.name for f in fields(Budget)}, "the budget")
    files = document["files"]
    calibrated = isinstance(files, dict) and CALIBRATION.json_name in files
    CHECKS.keys(files, {CONFIG_NAME, *(CALIBRATION.names if calibrated else ())}, "its files")
    return document


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
