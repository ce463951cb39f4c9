"""Documents as a forger would write them: changed, with the checksum made anew, so that the checks behind it are reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_dp_xattn.artefacts.documents import seal


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON document with its own checksum, whatever it said before."""
    path.write_text(json.dumps(seal({k: v for k, v in values.items() if k != "sha256"})))
