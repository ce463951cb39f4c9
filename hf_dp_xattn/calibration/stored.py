"""What all kinds of calibration share: how they stand on disk, and their card."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from ..artefacts import CardOptions, HubOptions, locate
from ..artefacts.checks import Checks
from ..artefacts.codec import Codec, Encoded
from ..config import DPXAttnConfig
from ..errors import ConfigError
from .calibration_card import Described, calibration_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

CHECKS = Checks("calibration", ConfigError, "calibrate again")
CODEC = Codec(CHECKS, "dp_xattn_calibration", 2, schema_key="schema_version")
JSON_NAME, TENSORS_NAME = CODEC.names


class Stored(Encoded):
    """A calibration of one kind. mechanism: whose releases it serves."""

    WORD = CHECKS.word
    CODEC = CODEC
    mechanism: ClassVar[str]
    if TYPE_CHECKING:

        @property
        def unit(self) -> str: ...

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={value!r}" for name, value in self.config_fields().items())
        return f"{type(self).__name__}({told})"

    def config_fields(self) -> dict[str, Any]:
        """What a config must say to go with it."""
        return {name: getattr(self, name) for name in ("mechanism", "unit", "neighboring")}

    def check_settings(self, config: DPXAttnConfig, settings: Mapping[str, Any]) -> None:
        """Raises ConfigError where the config says other than what the calibration was made with."""
        for name, value in settings.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"The calibration was made with {name}={value!r}, the config says {getattr(config, name)!r}. Calibrate again, or "
                    "change the config."
                )

    def useless(self, config: DPXAttnConfig) -> str | None:
        """Why a release at config.epsilon is not known to be better than none; None where it is, or was never compared.

        Args:
            config: of the release.
        """
        return None

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike[str], **options: Unpack[HubOptions]) -> Self:
        """Reads a calibration of this kind.

        Args:
            name_or_path: folder or Hub id.
            options: revision, token, subfolder, ... (`artefacts.HubOptions`).

        Raises:
            ConfigError: missing, unknown, damaged or of another schema.
        """
        return cls.load(locate(name_or_path, CODEC.names, error=ConfigError, **options).folder)

    @abstractmethod
    def described(self) -> Described:
        """What its card says of it."""

    def card(self, options: CardOptions) -> ModelCard:
        return calibration_card(self.described(), options)
