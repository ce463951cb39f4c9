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
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from ..calibration.stored import Stored
from ..config import DPXAttnConfig
from ..errors import ConfigError
from ..privacy.ledger import Budget
from ..report import PrivacyReport
from .protection import Protection


class Saved(Protocol):
    """What saving asks of a host's handle. model: the UNet or model; saving: of the model, which a pipeline has as a part."""

    config: DPXAttnConfig

    @property
    def model(self) -> Any: ...
    @property
    def saving(self) -> SaveShadow: ...
    @property
    def calibration(self) -> Stored | None: ...
    @property
    def budget(self) -> Budget: ...
    def report(self) -> PrivacyReport: ...


class SaveShadow:
    """Stands in for `save_pretrained` of a protected pipeline, UNet or model. Their `push_to_hub` calls it."""

    def __init__(self, host: Any, handle: Saved) -> None:
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
                self._protection().save(Path(arguments["save_directory"]))
            return result

        self._shadow = vars(self._host)["save_pretrained"] = save_pretrained

    def _protection(self) -> Protection:
        handle = self._handle
        report = handle.report()
        return Protection(
            config=handle.config,
            calibration=handle.calibration,
            budget=handle.budget,
            host=type(handle.model).__name__,
            pipeline=None if self._host is handle.model else type(self._host).__name__,
            public=report.public,
            not_covered=report.not_covered,
        )

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
