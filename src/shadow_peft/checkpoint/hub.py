"""Hugging Face Hub: where checkpoints are fetched from and pushed to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

_PATTERNS = ["shadow_*", "adapter_*"]


def local_directory(path_or_repo: str | Path) -> Path:
    """The directory of a checkpoint: a local one, or a snapshot of the hub repository `repo_id` or `repo_id@revision`.

    Raises:
        ValueError: it is neither a directory nor a repository that can be read.
    """
    path = Path(path_or_repo)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file; pass the directory that holds the checkpoint.")
    repo_id, _, revision = str(path_or_repo).partition("@")
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=_PATTERNS))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ValueError(f"{path_or_repo!r} is neither a local directory nor a readable hub repository.") from error


def push(
    save: Callable[[str], None],
    repo_id: str,
    *,
    commit_message: str,
    private: bool,
    token: str | None,
    revision: str | None,
    create_pr: bool,
) -> str:
    """Create the repository if needed and upload what `save` writes into a directory.

    Returns:
        The address of the commit, or of the pull request.
    """
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        save(directory)
        info = api.upload_folder(
            repo_id=repo, folder_path=directory, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    return info.pr_url or info.commit_url if create_pr else info.commit_url
