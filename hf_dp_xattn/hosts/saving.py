"""A protected pipeline or model on disk: its `save_pretrained` also writes the protection. `restoring.py` reads it.

*What is written.* Beside the host's own files, in `dp_xattn/`: the config, the calibration, the budget of a context, a card. All of it is
public. *What is not.* Releases: each is a private context's one artefact, and saving a model must not send them along; save or push a
release by itself. The ledger: what was spent belongs to the contexts, not to the model, and its key to nobody else. So whoever restores
passes the ledger that has counted so far; an empty one would let every context be released once more.

A UNet is saved with its protection too, a bare one and that of a pipeline (`pipe.unet.save_pretrained`); within a pipeline's own folder it
is written once, at the top.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..artefacts import card_file, card_options, dump_document, seal, write_files
from ..calibration.stored import JSON_NAME, TENSORS_NAME
from ..config import CONFIG_NAME
from ..errors import ConfigError

if TYPE_CHECKING:
    from .handle import ProtectedPipeline

FOLDER = "dp_xattn"
PROTECTION_NAME = "dp_xattn_protection.json"
SCHEMA = "hf_dp_xattn.protection/2"  # 1 had no checksum of its own, and the budget stands in it
CALIBRATION_NAMES = (JSON_NAME, TENSORS_NAME)


class SaveShadow:
    """Stands in for `save_pretrained` of a protected pipeline, UNet or model. Their `push_to_hub` calls it."""

    def __init__(self, host: Any, handle: ProtectedPipeline) -> None:
        self._host, self._handle = host, handle
        self._shadow: Callable[..., Any] | None = None
        self._quiet = False

    def install(self) -> None:
        original = self._host.save_pretrained
        signature = inspect.signature(original)

        @functools.wraps(original)
        def save_pretrained(*args: Any, **kwargs: Any) -> Any:
            if self._quiet:
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            if arguments.get("push_to_hub"):
                raise ConfigError(
                    "save_pretrained(push_to_hub=True) of a protected host would leave its protection behind. Call push_to_hub(repo_id)."
                )
            _refuse_adapters(self._host)
            with self._handle.saving.quiet():
                result = original(*args, **kwargs)
            if arguments.get("is_main_process", True):
                save_protection(self._handle, self._host, Path(arguments["save_directory"]))
            return result

        self._shadow = vars(self._host)["save_pretrained"] = save_pretrained

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Only the host's own files are written: the protection goes beside the pipeline that it is part of."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def remove(self) -> None:
        if self._shadow is not None and vars(self._host).get("save_pretrained") is self._shadow:
            del vars(self._host)["save_pretrained"]


def _refuse_adapters(host: Any) -> None:
    """Raises ConfigError for LoRA layers: diffusers writes them in a form that loads as random weights, transformers without the model."""
    parts = getattr(host, "components", None) or {"": host}
    for name, part in parts.items():
        if isinstance(part, nn.Module) and any(hasattr(m, "base_layer") for m in part.modules()):
            raise ConfigError(
                f"Adapters (LoRA) are loaded{f' in {name}' if name else ''}, and a folder with them would not load as what it is. Fuse and "
                "unload them (pipe.fuse_lora(); pipe.unload_lora_weights()), or unload them and save the adapter by itself. Nothing was "
                "written."
            )


def save_protection(handle: ProtectedPipeline, host: Any, directory: Path) -> Path:
    """Writes `dp_xattn/` into a host's folder; returns it."""
    from ..cards import protection_card

    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PROTECTION_NAME, *CALIBRATION_NAMES):  # of an earlier save
        (folder / name).unlink(missing_ok=True)
    handle.config.save_pretrained(folder)
    report = handle.report()
    card = protection_card(
        handle.config,
        handle.budget,
        handle.calibration,
        report.public,
        report.not_covered,
        card_options({}),
    )
    text = card_file(folder, card)
    names = [CONFIG_NAME]
    if handle.calibration is not None:
        handle.calibration.save_pretrained(folder)
        names += CALIBRATION_NAMES
    document = {
        "schema": SCHEMA,
        "host": type(handle.unet).__name__,
        "pipeline": None if host is handle.unet else type(host).__name__,
        "budget": asdict(handle.budget),
        "public": list(report.public),
        "not_covered": list(report.not_covered),
        "files": {name: sha256_of(folder / name) for name in names},
    }
    write_files(folder, {**text, PROTECTION_NAME: dump_document(seal(document))})
    return folder


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
