"""What a folder or Hub repository holds: a release, a protected model, a config or a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DPXAttnError


def find_artefact(name: str, **options: Any) -> tuple[str, Path]:
    """(kind, folder) of a folder or Hub id: "protection", "release", "config" or "calibration".

    Raises:
        ConfigError: none of them is there.
    """
    from ..artefacts import locate
    from ..calibration.stored import CODEC as CALIBRATION
    from ..config import CONFIG_NAME
    from ..hosts.protection import FOLDER, locate_protection
    from ..hosts.storage import CODEC as RELEASE

    if (Path(name) / (options.get("subfolder") or "") / FOLDER).is_dir():
        return "protection", locate_protection(name, **options).folder
    problem: DPXAttnError | None = None
    if not Path(name).is_dir():
        try:
            return "protection", locate_protection(name, **options).folder
        except ConfigError as error:
            problem = error
    for kind, names in (
        ("release", RELEASE.names),
        ("calibration", CALIBRATION.names),
        ("config", (CONFIG_NAME,)),
    ):
        try:
            folder = locate(name, names, error=ConfigError, **options).folder
        except ConfigError as error:
            problem = error
            continue
        if (folder / names[0]).is_file():
            return kind, folder
    if Path(name).is_dir() or problem is None:
        raise ConfigError(
            f"{Path(name).name!r} holds no release, config, calibration or protected model of this package."
        )
    raise problem


def readers() -> dict[str, Callable[[Path], Any]]:
    """How each kind is read, strictly."""
    from ..calibration.calibration import load_calibration
    from ..config import DPXAttnConfig
    from ..hosts.protection import read_protection
    from ..hosts.storage import ReleaseFile

    return {
        "protection": read_protection,
        "release": ReleaseFile.load,
        "config": DPXAttnConfig.from_file,
        "calibration": load_calibration,
    }
