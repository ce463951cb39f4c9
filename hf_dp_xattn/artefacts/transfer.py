"""The files of a `save_pretrained`: to a Hub repository, and back from a folder or a repository."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from ..errors import ConfigError, DPXAttnError, HubError
from .card import MARKER, README
from .documents import write_files

WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
)  # of a pipeline: weights, configs, tokenizers


class HubOptions(TypedDict, total=False):
    """Where and how `from_pretrained` looks, as in transformers and diffusers.

    revision: branch, tag or commit of a repository. token: of the Hub. subfolder: of the folder or repository. local_files_only: read the
    cache, never the network. cache_dir, force_download: as in huggingface_hub.
    """

    revision: str | None
    token: str | bool | None
    subfolder: str | None
    local_files_only: bool
    cache_dir: str | os.PathLike[str] | None
    force_download: bool


class PushOptions(TypedDict, total=False):
    """How `push_to_hub` uploads.

    private: of a repository that is new. token: of the Hub. revision: branch to commit to. create_pr: open a pull request instead.
    subfolder: of the repository. commit_message. license, base_model: for the card ("apache-2.0"; the Hub id of the model it is for).
    """

    private: bool | None
    token: str | bool | None
    revision: str | None
    create_pr: bool
    subfolder: str | None
    commit_message: str | None
    license: str | None
    base_model: str | None


@dataclass(frozen=True)
class Found:
    """folder: that holds the files. commit: of the repository that they came from, or None for a local folder."""

    folder: Path
    commit: str | None = None


def check_options(options: Any, known: type, what: str) -> None:
    """Raises ConfigError for options that are none: a misspelt `revision` must not read another one."""
    unknown = sorted(set(options) - set(known.__annotations__))
    if unknown:
        raise ConfigError(
            f"Unknown option(s) of {what}: {', '.join(unknown)}. Known: {', '.join(known.__annotations__)}."
        )


def _parts(subfolder: str | None, error: type[DPXAttnError]) -> tuple[str, ...]:
    """A subfolder's parts. Raises `error` where it would leave the folder or repository."""
    if subfolder is None:
        return ()
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts or "\\" in subfolder or ":" in subfolder:
        raise error("`subfolder` must be a relative path inside the folder or repository, without '..'.")
    return path.parts


def locate(
    name_or_path: str | os.PathLike[str],
    names: Sequence[str],
    *,
    error: type[DPXAttnError],
    **options: Any,
) -> Found:
    """The folder that holds `names`: a local one, or the downloaded files of one commit of a Hub repository.

    Args:
        options: `HubOptions`.

    Raises:
        error: `name_or_path` is no folder, and no repository that can be reached; the subfolder leads out of it; a revision of a local
            folder was asked for. ConfigError: unknown options.
    """
    check_options(options, HubOptions, "from_pretrained")
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise error(f"Pass the name of a folder, or a Hub id, not {type(name_or_path).__name__}.")
    subfolder = options.pop("subfolder", None)
    parts = _parts(subfolder, error)
    folder = Path(name_or_path)
    if folder.is_dir():
        if options.get("revision") is not None:
            raise error("A local folder has no revisions; leave `revision` out.")
        return Found(folder.joinpath(*parts))
    from huggingface_hub import hf_hub_download

    options = {k: v for k, v in options.items() if v is not None}
    commit: str | None = None
    paths = []
    try:
        for name in names:
            if commit is not None:
                options["revision"] = commit  # all files of one artefact come from one commit
            paths.append(
                Path(hf_hub_download(str(name_or_path), name, subfolder="/".join(parts) or None, **options))
            )
            commit = paths[0].parents[len(parts)].name
    except Exception as cause:
        raise _unreadable(cause, str(name_or_path), error) from None
    return Found(paths[0].parent, commit)


def download_folder(
    name: str, subfolder: str, *, error: type[DPXAttnError], revision: str, **options: Any
) -> Path:
    """A subfolder of a Hub repository at one commit, without pickles and code.

    Raises:
        error: it cannot be read.
    """
    from huggingface_hub import snapshot_download

    parts = _parts(subfolder, error)
    known = {k: v for k, v in options.items() if v is not None}
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["/".join((*map(glob.escape, parts), pattern)) for pattern in WANTED],
            **known,
        )
    except Exception as cause:
        raise _unreadable(cause, name, error) from None
    return Path(folder).joinpath(*parts)


def _unreadable(cause: Exception, name: str, error: type[DPXAttnError]) -> Exception:
    """What to raise where something could not be read from the Hub; a bug stays what it is."""
    if not _is_hub_error(cause):
        return cause
    from huggingface_hub.errors import RemoteEntryNotFoundError

    if isinstance(cause, RemoteEntryNotFoundError):
        return error(
            f"{name!r} could not be read from the Hub: the repository is there and does not hold what was looked for. Is it of another "
            "kind, or is that in a subfolder?"
        )
    return error(
        f"{name!r} is no folder, and it could not be read from the Hub ({type(cause).__name__}). Check the name, the revision, the token "
        "and the network."
    )


def _is_hub_error(cause: Exception) -> bool:
    """No such name, repository, revision or file; no access; no network; a server or a download that failed."""
    from huggingface_hub import errors

    http: type[Exception] = vars(errors)["HTTPError"]  # of whichever client it uses
    return isinstance(cause, (errors.EntryNotFoundError, http, OSError, ValueError))


def push_files(files: Mapping[str, bytes], repo_id: str, message: str, options: Mapping[str, Any]) -> str:
    """Creates the repository if needed, and uploads the files in one commit. A README.md that somebody else wrote stays as it is.

    Args:
        files: content by name.
        repo_id: "owner/name".
        message: of the commit, unless the options have one.
        options: `PushOptions`.

    Returns:
        The commit's address.

    Raises:
        HubError: the Hub refused, failed or cannot be reached. A commit is made whole or not at all.
    """
    parts = _parts(options.get("subfolder"), ConfigError)
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    revision, create_pr = options.get("revision"), options.get("create_pr", False)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), files)
        try:
            api.create_repo(repo_id, private=options.get("private"), exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if README in files and _has_foreign_card(api, repo_id, parts, revision):
                (Path(folder) / README).unlink()
            return str(
                api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    path_in_repo="/".join(parts) or None,
                    commit_message=options.get("commit_message") or message,
                    revision=revision,
                    create_pr=create_pr,
                )
            )
        except Exception as cause:
            if not _is_hub_error(cause):
                raise
            status = getattr(getattr(cause, "response", None), "status_code", None)
            raise HubError(
                f"The upload failed ({type(cause).__name__}{'' if status is None else f', HTTP {status}'}). The commit was not made: the "
                "repository holds what it held before. Check the name, the token and the network, then push again."
            ) from None


def _has_foreign_card(api: Any, repo_id: str, parts: Sequence[str], revision: str | None) -> bool:
    """Whether the repository has a README.md that this package did not write."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as cache:
        try:
            name = "/".join((*parts, README))
            path = api.hf_hub_download(repo_id, name, revision=revision, cache_dir=cache)
        except RemoteEntryNotFoundError:
            return False
        return MARKER not in Path(path).read_text(encoding="utf-8", errors="replace")
