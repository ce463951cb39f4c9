"""The files of a `save_pretrained`: to a Hub repository, and back from a folder or a repository."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import DPXAttnError


def push_files(
    save: Callable[[str], Any],
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
) -> str:
    """Writes the files to a temporary folder with `save(folder)`, creates the repository if needed, uploads the folder in one
    commit. Returns the commit's address. Nothing is uploaded when `save` raises."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def find_files(
    name_or_path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    error: type[DPXAttnError],
    **hub_kwargs: Any,
) -> Path:
    """The folder that holds `names`: a local one, or the downloaded files of a Hub repository (`revision`, `token`, `subfolder`, ...).

    Raises:
        error: `name_or_path` is no folder, and no repository that can be reached.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        paths = [Path(hf_hub_download(str(name_or_path), name, **hub_kwargs)) for name in names]
        return paths[0].parent
    except (EntryNotFoundError, OSError, ValueError) as cause:  # no such name, repository or file; no network
        raise error(
            f"{folder.name!r} is no folder, and it could not be read from the Hub ({type(cause).__name__}). Check the name, the "
            "revision and the network."
        ) from None
