from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from hf_dp_xattn import ConfigError, DPXAttnConfig
from hf_dp_xattn.config import CONFIG_NAME


class FakeApi:
    """Stands in for HfApi: repositories are folders."""

    root: Path

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        for file in Path(folder_path).iterdir():
            (self.root / repo_id / file.name).write_bytes(file.read_bytes())
        return f"https://hub.invalid/{repo_id}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    FakeApi.root = tmp_path

    def download(repo_id: str, name: str, **kwargs: Any) -> str:
        path = tmp_path / repo_id / name
        if not path.is_file():
            raise huggingface_hub.errors.EntryNotFoundError(name)
        return str(path)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path


def test_a_config_goes_up_and_comes_back(hub: Path) -> None:
    config = DPXAttnConfig(epsilon=2.0, unit="context")
    assert config.push_to_hub("me/config").endswith("me/config")
    assert [f.name for f in (hub / "me/config").iterdir()] == [CONFIG_NAME]
    assert DPXAttnConfig.from_pretrained("me/config") == config


@pytest.mark.parametrize("name", ["me/nothing", "no such folder", "a/b/c/d"])
def test_what_is_not_there_is_a_clear_error(hub: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="could not be read from the Hub"):
        DPXAttnConfig.from_pretrained(name)


def test_without_a_network_the_error_is_ours() -> None:
    with pytest.raises(ConfigError, match="could not be read from the Hub"):
        DPXAttnConfig.from_pretrained("me/nothing")
