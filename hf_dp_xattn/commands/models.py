"""Models of the command line: a folder or Hub id, protected already or plain. Loaded from safetensors, without foreign code."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..calibration.calibration import AnyCalibration
    from ..config import DPXAttnConfig
    from ..privacy.ledger import Ledger

SETTINGS = ("mechanism", "epsilon", "delta", "unit", "neighboring")
_DTYPES = ("float16", "half", "bfloat16", "float32", "float", "float64", "double")


def add_protection(parser: argparse.ArgumentParser) -> None:
    """The options that say how a plain model is protected."""
    parser.add_argument(
        "model", help="folder or Hub id of a diffusers pipeline or a transformers model, plain or protected"
    )
    parser.add_argument(
        "--config",
        metavar="FOLDER",
        help="folder or Hub id of a config, in place of the five settings that follow",
    )
    parser.add_argument("--epsilon", type=float, metavar="E", help="privacy loss of the release")
    parser.add_argument(
        "--allow-uncalibrated",
        action="store_true",
        help="go on without a calibration, where the budget is spent for noise",
    )
    parser.add_argument(
        "--allow-large-epsilon", action="store_true", help="take an epsilon above 100, which promises nothing"
    )
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """All settings but epsilon, the calibration, and the type of the weights."""
    parser.add_argument(
        "--mechanism",
        choices=("anchors", "kernel_sum", "library", "dptree"),
        help="what is released (default: what the calibration is for)",
    )
    parser.add_argument("--delta", type=float, metavar="D", help="failure probability (default: 1e-5)")
    parser.add_argument(
        "--unit",
        choices=("row", "group", "context"),
        help="what one neighbouring step changes (default: the calibration's; without one, group)",
    )
    parser.add_argument(
        "--neighboring",
        choices=("replace_one", "add_or_remove_one"),
        help="how it changes (default: the calibration's where it has one, else replace_one)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="folder or Hub id of a calibration for this model; mechanism, unit and relation are its own where they are not given",
    )
    parser.add_argument(
        "--allow-useless",
        action="store_true",
        help="go on where the calibration says that the release is not known to be better than none",
    )
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: float32)")


def protected_model(args: argparse.Namespace, ledger: Ledger, *, trial: bool = False) -> Any:
    """The handle of the model that the options describe. What they leave open is taken from the calibration, where there is one.

    trial: of public texts, which may be released for nothing.

    Raises:
        ConfigError: options that contradict a protection which is there, or the calibration, or none that say how to protect.
            UnsupportedModelError: see `protect`.
    """
    from ..hosts.protect import handle_of, protect
    from ..hosts.protection import FOLDER
    from ..hosts.restoring import from_pretrained

    dtype, useless = parse_dtype(args.dtype), trial or args.allow_useless
    given = [name for name in ("config", *SETTINGS, "calibration") if getattr(args, name) is not None]
    if (Path(args.model) / FOLDER).is_dir():
        if given:
            raise ConfigError(
                f"{Path(args.model).name!r} is protected already; leave out --{', --'.join(given)}."
            )
        return handle_of(from_pretrained(args.model, ledger=ledger, dtype=dtype, allow_useless=useless))
    _check_settings(args, given)
    calibration = None
    if args.calibration is not None:
        from ..calibration.calibration import Calibration

        calibration = Calibration.from_pretrained(args.calibration)
    config = _config(args, calibration)
    return protect(
        load_plain(args.model, dtype),
        config,
        calibration=calibration,
        ledger=ledger,
        allow_useless=useless,
        allow_uncalibrated=args.allow_uncalibrated,
        allow_large_epsilon=args.allow_large_epsilon,
    )


def parse_dtype(name: str) -> Any:
    """A floating-point type of torch. Raises ConfigError."""
    import torch

    if name not in _DTYPES:  # torch has more, in which no model runs
        raise ConfigError(f"--dtype must be a floating-point type that models run in, got {name!r}.")
    return getattr(torch, name)


def _check_settings(args: argparse.Namespace, given: list[str]) -> None:
    if args.config is not None:
        if set(given) & set(SETTINGS):
            raise ConfigError("Give either --config or the settings themselves, not both.")
    elif args.epsilon is None:
        raise ConfigError("Say what a release may cost: --epsilon E, or --config FOLDER.")


def _config(args: argparse.Namespace, calibration: AnyCalibration | None) -> DPXAttnConfig:
    from ..config import DPXAttnConfig

    if args.config is not None:
        return DPXAttnConfig.from_pretrained(args.config)
    given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    from ..hosts.chosen import settings_of

    return DPXAttnConfig(**{**({} if calibration is None else settings_of(calibration)), **given})


def load_plain(name: str, dtype: Any) -> Any:
    """A diffusers pipeline or a transformers model.

    Raises:
        ConfigError: it is neither.
    """
    from ..artefacts import locate, read_document

    try:
        index = locate(name, ("model_index.json",), error=ConfigError)
        is_pipeline = (index.folder / "model_index.json").is_file()
    except ConfigError:
        is_pipeline = False
    try:
        if is_pipeline:
            from diffusers import DiffusionPipeline

            return DiffusionPipeline.from_pretrained(name, use_safetensors=True, dtype=dtype)
        import transformers

        folder = locate(name, ("config.json",), error=ConfigError).folder
        named = read_document(folder / "config.json", ConfigError).get("architectures")
        cls = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
        if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
            raise ConfigError(f"{Path(name).name!r} names no model of this version of transformers.")
        model: Any = cls
        return model.from_pretrained(name, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"The model cannot be loaded ({type(error).__name__}): {error}") from None
