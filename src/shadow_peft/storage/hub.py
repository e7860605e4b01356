"""Download from and upload to the Hugging Face Hub; its client is imported when it is used."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

_PATTERNS = ("shadow_*", "adapter_*", "base_adapter.safetensors", "cascade.json", ".saved/*")
"""Files of an adapter and the calibration of its cascade; the last ones are there if a folder was uploaded in which a save
was interrupted."""


def local_directory(path_or_repo: str | Path, patterns: Sequence[str] = _PATTERNS) -> Path:
    """The directory of a checkpoint: a local one, or a snapshot of a hub repository or of a folder in it.

    Args:
        path_or_repo: a directory, `owner/name` or `owner/name/folder`; `@revision` may follow the last two.
        patterns: names of the files that are fetched from the hub.

    Raises:
        ValueError: it is neither a directory nor a repository that can be read, or the repository has no such folder.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file; pass the directory that holds the checkpoint.")
    return _snapshot(str(path_or_repo), patterns)


def _snapshot(path_or_repo: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    place, _, revision = path_or_repo.partition("@")
    owner, *rest = place.split("/", 2)
    repo_id, folder = "/".join([owner, *rest[:1]]), "".join(rest[1:]).rstrip("/")
    wanted = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
    try:
        directory = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=wanted)) / folder
    except RevisionNotFoundError as error:
        raise ValueError(f"The hub repository {repo_id!r} has no revision {revision!r}.") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(
            f"{path_or_repo!r} is neither a directory nor a hub repository that can be read here. Check its name; for "
            "a private one, log in with a token that may read it."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{path_or_repo!r} is no directory, and the hub cannot be reached for a repository of that name: {error}"
        ) from error
    if folder and not directory.is_dir():
        raise ValueError(f"The hub repository {repo_id!r} has no adapter in a folder {folder!r}.")
    return directory


def push(
    save: Callable[[str], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool,
    token: str | None,
    revision: str | None,
    create_pr: bool,
    replaces: Collection[str] = (),
) -> str:
    """Upload what `save` writes into a directory, to a repository that is created if needed.

    Args:
        replaces: names of files that go from the repository with the same commit, unless they are uploaded anew.

    Returns:
        The address of the commit, or of the pull request.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as directory:
        save(directory)  # first, so that nothing is created on the hub if saving fails
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            delete_patterns=sorted(replaces),
        )
    return info.pr_url or info.commit_url
