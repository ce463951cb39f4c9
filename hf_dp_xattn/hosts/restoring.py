"""`dpx.from_pretrained`: a protected pipeline or model, as `saving.py` wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from ..artefacts import Found, HubOptions, download_folder, locate, read_document, unseal
from ..calibration.anchors.anchors_calibration import AnchorCalibration
from ..calibration.calibration import Calibration, load_calibration
from ..calibration.stored import JSON_NAME
from ..config import CONFIG_NAME, DPXAttnConfig
from ..errors import ConfigError
from ..privacy.ledger import Budget, Ledger
from .protect import protect, protect_to_serve
from .saving import CALIBRATION_NAMES, FOLDER, PROTECTION_NAME, SCHEMA, sha256_of

_KEYS = {"schema", "host", "pipeline", "budget", "public", "not_covered", "files"}
_REFUSED = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_safetensors", "state_dict")


def from_pretrained(name_or_path: str | Path, *, ledger: Ledger | None = None, **options: Any) -> Any:
    """Restores a protected pipeline or model in one call: what its `save_pretrained` or `push_to_hub` wrote.

    Weights are read from safetensors only, and no code of the repository is run. `dpx.handle_of(host)` gives the handle.

    Args:
        name_or_path: folder or Hub id.
        ledger: what has been spent so far. Without one it is the process's (HF_DP_XATTN_LEDGER, or in memory), which does not know what
            was spent in another ledger or process: contexts that were released there can be released once more.
        options: revision, token, subfolder, local_files_only, cache_dir, force_download; what else the host's own `from_pretrained` takes
            (dtype, ...) is passed on.

    Returns:
        The diffusers pipeline, UNet or transformers model, protected.

    Raises:
        ConfigError: there is no protection, or it is damaged, of another schema, or for another host. No host is returned then.
    """
    refused = sorted(set(options) & set(_REFUSED))
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: a protected host is loaded from safetensors, and without foreign code. Load it with its own library, "
            "and call dpx.protect."
        )
    where: dict[str, Any] = {k: options.pop(k) for k in list(options) if k in HubOptions.__annotations__}
    subfolder = where.pop("subfolder", None)
    found = locate_protection(name_or_path, subfolder=subfolder, **where)
    protection = read_protection(found.folder)
    if found.commit is None:
        host = _load(protection.document, str(found.folder.parent), None, options)
    else:
        where |= {"revision": found.commit}  # everything from one commit
        host = _load(protection.document, str(name_or_path), subfolder, {**where, **options})
    config, calibration = protection.config, protection.calibration
    if calibration is None and config.mechanism == "anchors":
        protect_to_serve(host, config, ledger=ledger, budget=protection.budget)
    else:
        protect(host, config, calibration=calibration, ledger=ledger, budget=protection.budget)
    return host


@dataclass(frozen=True)
class Protection:
    """What stands in `dp_xattn/`. document: the JSON."""

    document: dict[str, Any]
    config: DPXAttnConfig
    calibration: Calibration | AnchorCalibration | None
    budget: Budget


def locate_protection(name_or_path: str | Path, **where: Unpack[HubOptions]) -> Found:
    """The folder with a protection's files, all of one commit. Raises ConfigError where there is none."""
    subfolder = where.pop("subfolder", None)
    own = FOLDER if subfolder is None else f"{subfolder}/{FOLDER}"
    try:
        found = locate(
            name_or_path, (PROTECTION_NAME, CONFIG_NAME), error=ConfigError, subfolder=own, **where
        )
        document = _read(found.folder)
    except ConfigError as error:
        raise ConfigError(
            f"{error} A protected host's save_pretrained writes a folder {FOLDER}/ beside the model; protect a plain one with dpx.protect."
        ) from None
    if found.commit is not None and JSON_NAME in document["files"]:
        where["revision"] = found.commit
        locate(name_or_path, CALIBRATION_NAMES, error=ConfigError, subfolder=own, **where)
    return found


def read_protection(folder: Path) -> Protection:
    """Reads and checks all of it; raises ConfigError."""
    document = _read(folder)
    for name, digest in document["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise ConfigError(
                f"{name} is missing or does not have the checksum that {PROTECTION_NAME} states. Download or save the folder again."
            )
    config = DPXAttnConfig.from_file(folder)
    calibration = load_calibration(folder) if JSON_NAME in document["files"] else None
    return Protection(document, config, calibration, Budget(**document["budget"]))


def _read(folder: Path) -> dict[str, Any]:
    document = read_document(folder / PROTECTION_NAME, ConfigError)
    if document.get("schema") != SCHEMA:
        raise ConfigError(
            f"This protection has schema {document.get('schema')!r}, this package reads {SCHEMA!r}. Upgrade hf_dp_xattn, or save it anew."
        )
    document = unseal(document, PROTECTION_NAME, ConfigError)
    files, budget = document.get("files"), document.get("budget")
    fit = (
        set(document) == _KEYS
        and isinstance(files, dict)
        and set(files) in ({CONFIG_NAME}, {CONFIG_NAME, *CALIBRATION_NAMES})
        and isinstance(budget, dict)
        and set(budget) == {"epsilon", "delta", "unit", "neighboring"}
        and isinstance(document["host"], str)
        and all(isinstance(document[name], list) for name in ("public", "not_covered"))
        and isinstance(document["pipeline"], (str, type(None)))
    )
    if not fit:
        raise ConfigError(
            f"Unknown or missing keys in {PROTECTION_NAME}; it was edited, or upgrade hf_dp_xattn."
        )
    return document


def _load(document: dict[str, Any], name: str, subfolder: str | None, options: dict[str, Any]) -> Any:
    """The plain host, by its own library. Raises ConfigError where it is of another class than was saved."""
    if document["pipeline"] is not None:
        from diffusers import DiffusionPipeline

        if subfolder is not None:  # diffusers takes none for a pipeline
            where = {k: options.pop(k) for k in list(options) if k in HubOptions.__annotations__}
            name = str(download_folder(name, subfolder, error=ConfigError, **where))
        host: Any = DiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)
        classes = [type(host).__name__, type(getattr(host, "unet", None)).__name__]
        expected = [document["pipeline"], document["host"]]
    else:
        cls = _model_class(document["host"])
        if subfolder is not None:
            options = {**options, "subfolder": subfolder}
        host = cls.from_pretrained(name, use_safetensors=True, **options)
        classes, expected = [type(host).__name__], [document["host"]]
    if classes != expected:
        raise ConfigError(
            f"The folder holds a {' with '.join(classes)}, its protection is for a {' with '.join(expected)}."
        )
    return host


def _model_class(name: str) -> Any:
    """A UNet of diffusers or a model of transformers, by name. Raises ConfigError."""
    import transformers
    from diffusers import UNet2DConditionModel

    if name == UNet2DConditionModel.__name__:
        return UNet2DConditionModel
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"{name!r} is no model of this version of transformers.")
    return cls
