"""`dpx.from_pretrained`: a protected pipeline or model, as `saving.py` wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from ..artefacts import HubOptions, download_folder
from ..errors import ConfigError
from ..known_mechanisms import KNOWN
from ..privacy.ledger import Ledger
from .protect import protect, protect_to_serve
from .protection import Protection, locate_protection, read_protection

_REFUSED = ("trust_remote_code", "custom_pipeline", "custom_revision", "use_safetensors", "state_dict")


def from_pretrained(
    name_or_path: str | Path,
    *,
    ledger: Ledger | None = None,
    encoder: Any = None,
    allow_useless: bool = False,
    **options: Any,
) -> Any:
    """Restores a protected pipeline or model in one call: what its `save_pretrained` or `push_to_hub` wrote.

    Weights are read from safetensors only, and no code of the repository is run. `dpx.handle_of(host)` gives the handle.

    Args:
        name_or_path: folder or Hub id.
        ledger: what has been spent so far. Without one it is the process's (HF_DP_XATTN_LEDGER, or in memory), which does not know what
            was spent in another ledger or process: contexts that were released there can be released once more.
        encoder: mechanism="library" only: what made the library's codes, where that was not the host's own text encoder.
        allow_useless: as in `protect`.
        options: revision, token, subfolder, local_files_only, cache_dir, force_download; what else the host's own `from_pretrained` takes
            (dtype, ...) is passed on.

    Returns:
        The diffusers pipeline, UNet or transformers model, protected.

    Raises:
        ConfigError: there is no protection, or it is damaged, of another schema, or for another host. No host is returned then.

    Example:
        >>> protected = dpx.protect(pipe, calibration=library)
        >>> pipe.save_pretrained("protected-pipeline")
        >>> again = dpx.from_pretrained("protected-pipeline")
        >>> dpx.handle_of(again).config == protected.config
        True
    """
    refused = sorted(set(options) & set(_REFUSED))
    if refused:
        raise ConfigError(
            f"{', '.join(refused)}: a protected host is loaded from safetensors, and without foreign code. Load it with its own library, "
            "and call dpx.protect."
        )
    where: dict[str, Any] = {k: options.pop(k) for k in list(options) if k in HubOptions.__annotations__}
    subfolder = where.pop("subfolder", None)
    located = locate_protection(name_or_path, subfolder=subfolder, **where)
    protection = read_protection(located.folder)
    if located.commit is None:
        host = _load(protection, str(located.folder.parent), None, options)
    else:
        where |= {"revision": located.commit}  # everything from one commit
        host = _load(protection, str(name_or_path), subfolder, {**where, **options})
    config, calibration = protection.config, protection.calibration
    if calibration is None and KNOWN[config.mechanism].needs_calibration:
        protect_to_serve(host, config, ledger=ledger, budget=protection.budget)
    else:
        protect(
            host,
            config,
            calibration=calibration,
            ledger=ledger,
            budget=protection.budget,
            encoder=encoder,
            allow_useless=allow_useless,
            allow_uncalibrated=True,  # that was said where it was saved
            allow_large_epsilon=True,
        )
    return host


def _load(protection: Protection, name: str, subfolder: str | None, options: dict[str, Any]) -> Any:
    """The plain host, by its own library. Raises ConfigError where it is of another class than was saved."""
    pipeline, by_text = protection.pipeline, KNOWN[protection.config.mechanism].releases == "texts"
    if by_text and _is_pipeline(protection.host):  # the whole of it is the host
        pipeline = pipeline or protection.host
    if pipeline is not None:
        from diffusers import DiffusionPipeline

        if subfolder is not None:  # diffusers takes none for a pipeline
            where = {k: options.pop(k) for k in list(options) if k in HubOptions.__annotations__}
            name = str(download_folder(name, subfolder, error=ConfigError, **where))
        host: Any = DiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)
        classes = [type(host).__name__, type(getattr(host, "unet", None)).__name__]
        expected = [pipeline, protection.host]
        if by_text:
            classes, expected = classes[:1], expected[:1]
    else:
        cls = _model_class(protection.host)
        if subfolder is not None:
            options = {**options, "subfolder": subfolder}
        host = cls.from_pretrained(name, use_safetensors=True, **options)
        classes, expected = [type(host).__name__], [protection.host]
    if classes != expected:
        raise ConfigError(
            f"The folder holds a {' with '.join(classes)}, its protection is for a {' with '.join(expected)}."
        )
    return host


def _is_pipeline(name: str) -> bool:
    import diffusers

    cls = getattr(diffusers, name, None)
    return isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)


def _model_class(name: str) -> Any:
    """A UNet of diffusers or a model of transformers, by name. Raises ConfigError."""
    from diffusers import UNet2DConditionModel

    if name == UNet2DConditionModel.__name__:
        return UNet2DConditionModel
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"{name!r} is no model of this version of transformers.")
    return cls
