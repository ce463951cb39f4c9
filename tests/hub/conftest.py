"""The Hub stand-in, and huggingface_hub pointed at it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from ..hosts_tiny import tiny_sd
from .server import TOKEN, FakeHub, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """HF_ENDPOINT takes effect at the import of huggingface_hub only, so its constants are set; test_command_line.py uses the variable."""
    with serve() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        # the client whose methods diffusers imports, and the one that transformers makes when first needed
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", fake.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        close_session()
        yield fake
        close_session()


@pytest.fixture
def pipe() -> Any:
    return tiny_sd()
