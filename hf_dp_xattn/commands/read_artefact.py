"""What a folder or Hub repository holds: a release, a protected model, a config or a calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DPXAttnError, ReleaseError


def read_artefact(name: str, **options: Any) -> tuple[str, Any]:
    """Reads and checks what is at a folder or Hub id.

    Args:
        name: folder or Hub id.
        options: revision, subfolder, ... (`artefacts.HubOptions`).

    Returns:
        Its kind: "protection", "release", "config" or "calibration"; and the artefact.

    Raises:
        ConfigError: none of them is there. ConfigError or ReleaseError: it is damaged, or of another schema.
    """
    from ..artefacts import locate
    from ..calibration.kinds import load_calibration
    from ..calibration.stored import CODEC
    from ..config import CONFIG_NAME, DPXAttnConfig
    from ..hosts.protection import FOLDER, locate_protection, read_protection
    from ..hosts.storage import JSON_NAME
    from ..hosts.text.text_release_file import load_release, locate_release

    local = Path(name).is_dir()
    problem: DPXAttnError | None = None
    if not local or (Path(name) / (options.get("subfolder") or "") / FOLDER).is_dir():
        try:
            folder = locate_protection(name, **options).folder
        except ConfigError as error:
            if local:
                raise
            problem = error
        else:
            return "protection", read_protection(folder)
    if not local or (Path(name) / (options.get("subfolder") or "") / JSON_NAME).is_file():
        try:
            folder = locate_release(name, **options)
        except ReleaseError as error:
            if local:
                raise
            problem = ConfigError(str(error))
        else:
            return "release", load_release(folder)
    kinds: tuple[tuple[str, tuple[str, ...], Callable[[Path], Any]], ...] = (
        ("calibration", CODEC.names, load_calibration),
        ("config", (CONFIG_NAME,), DPXAttnConfig.from_file),
    )
    for kind, names, read in kinds:
        try:
            folder = locate(name, names, error=ConfigError, **options).folder
        except ConfigError as error:
            problem = error
            continue
        if (folder / names[0]).is_file():
            return kind, read(folder)
    if local or problem is None:
        raise ConfigError(
            f"{Path(name).name!r} holds no release, config, calibration or protected model of this package."
        )
    raise problem
