"""Models of the command line: a folder or Hub id, protected already or plain. Loaded from safetensors, without foreign code."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import DPXAttnConfig
    from ..privacy.ledger import Ledger

SETTINGS = ("mechanism", "epsilon", "delta", "unit", "neighboring")


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
    parser.add_argument("--mechanism", choices=("anchors", "kernel_sum", "dptree"), help="what is released")
    parser.add_argument("--epsilon", type=float, metavar="E", help="privacy loss of the release")
    parser.add_argument("--delta", type=float, metavar="D", help="failure probability (default: 1e-5)")
    parser.add_argument(
        "--unit", choices=("row", "group", "context"), help="what one neighbouring step changes"
    )
    parser.add_argument("--neighboring", choices=("replace_one", "add_or_remove_one"), help="how it changes")
    parser.add_argument(
        "--calibration", metavar="FOLDER", help="folder or Hub id of a calibration for this model"
    )
    parser.add_argument("--dtype", default="float32", help="type of the weights (default: float32)")


def protected_model(args: argparse.Namespace, ledger: Ledger) -> Any:
    """The handle of the model that the options describe.

    Raises:
        ConfigError: options that contradict a protection which is there, or none that say how to protect. UnsupportedModelError: see
            `protect`.
    """
    from ..hosts.protect import handle_of, protect
    from ..hosts.restoring import from_pretrained
    from ..hosts.saving import FOLDER

    dtype = parse_dtype(args.dtype)
    given = [name for name in ("config", *SETTINGS, "calibration") if getattr(args, name) is not None]
    if (Path(args.model) / FOLDER).is_dir():
        if given:
            raise ConfigError(
                f"{Path(args.model).name!r} is protected already; leave out --{', --'.join(given)}."
            )
        return handle_of(from_pretrained(args.model, ledger=ledger, torch_dtype=dtype))
    config = _config(args, given)
    calibration = None
    if args.calibration is not None:
        from ..calibration.calibration import Calibration

        calibration = Calibration.from_pretrained(args.calibration)
    return protect(load_plain(args.model, dtype), config, calibration=calibration, ledger=ledger)


def parse_dtype(name: str) -> Any:
    """A floating-point type of torch. Raises ConfigError."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"--dtype must be a floating-point type of torch, got {name!r}.")
    return dtype


def _config(args: argparse.Namespace, given: list[str]) -> DPXAttnConfig:
    from ..config import DPXAttnConfig

    if args.config is not None:
        if set(given) & set(SETTINGS):
            raise ConfigError("Give either --config or the settings themselves, not both.")
        return DPXAttnConfig.from_pretrained(args.config)
    if args.epsilon is None:
        raise ConfigError("Say what a release may cost: --epsilon E, or --config FOLDER.")
    return DPXAttnConfig(
        **{name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
    )


def load_plain(name: str, dtype: Any) -> Any:
    """A diffusers pipeline or a transformers model.

    Raises:
        ConfigError: it is neither.
    """
    from ..hub import locate, read_document

    try:
        index = locate(name, ("model_index.json",), error=ConfigError)
        is_pipeline = (index.folder / "model_index.json").is_file()
    except ConfigError:
        is_pipeline = False
    try:
        if is_pipeline:
            from diffusers import DiffusionPipeline

            return DiffusionPipeline.from_pretrained(name, use_safetensors=True, torch_dtype=dtype)
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


def release_text(handle: Any, args: argparse.Namespace, text: str) -> Any:
    """Releases one text, by the tokenizer beside the model."""
    from ..hosts.decoder_only.handle import ProtectedDecoder
    from ..hosts.seq2seq.handle import ProtectedSeq2Seq

    if not isinstance(handle, (ProtectedDecoder, ProtectedSeq2Seq)):
        return handle.release(text, groups="phrases" if handle.config.unit == "group" else None)
    if handle.config.unit == "group":
        raise ConfigError("On the command line a text is one sequence: use --unit row or --unit context.")
    ids, start = tokenize(args.model, text)
    if isinstance(handle, ProtectedSeq2Seq):
        return handle.release(input_ids=ids, attention_mask=ids.new_ones(ids.shape))
    return handle.release(ids, public_head=start)


def tokenize(name: str, text: str) -> tuple[Any, int]:
    """ids [1, n], and how many of them at the start are the same for every text."""
    from ..errors import ContextError
    from ..hosts.text import without_length_warning

    tokenizer = load_tokenizer(name)
    with without_length_warning(tokenizer):
        ids = tokenizer([text], return_tensors="pt").input_ids
    if ids.shape[1] > tokenizer.model_max_length:
        raise ContextError("A text has more tokens than the model takes; nothing was spent.")
    return ids, int(ids[0, 0] == tokenizer.bos_token_id) if tokenizer.bos_token_id is not None else 0


@functools.lru_cache(maxsize=1)
def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model of transformers.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"There is no tokenizer beside the model ({type(error).__name__}); save one there."
        ) from None
