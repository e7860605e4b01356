"""A save that happens all or none, on any file system that can rename; needs no torch.

    1  new files and a manifest are written into `.saving-<random>/` and flushed to the disk
    2  that folder is renamed to `.saved/`: with this one rename the save has happened
    3  its files move out into the directory as the manifest says, and those of the earlier save into `.saved/.old/`
    4  `.saved/` is renamed away and deleted

Readers see a folder through `visible_files`, for which the files in `.saved/` come before those beside it: wherever a
process is killed, they see the old files or the new ones. The next save ends an earlier one that stopped between 2 and 4,
and deletes what one left that stopped before. An exception takes the save back, up to 4.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from shadow_peft.storage.files import read_json, write_json

SAVED, OLD, MANIFEST = ".saved", ".old", "manifest.json"
STAGING = ".saving-"

_ATTEMPTS = 10
"""How often a reader starts again because a save came in between."""

T = TypeVar("T")


class _Manifest(NamedTuple):
    written: list[str]
    removed: list[str]


@contextmanager
def all_or_none(directory: str | os.PathLike[str], removing: Collection[str] = ()) -> Iterator[Path]:
    """A staging directory whose files appear in `directory` together at the end.

    An exception leaves the directory as it was.

    Args:
        directory: created when it is missing.
        removing: names of files that go from there, if they are not written anew.

    Raises:
        ValueError: `directory` is a file.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"Cannot save into {target}: it is a file, not a directory.")
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    finish_save(target)
    _delete_leftovers(target)
    staging = _staging_name(target)
    try:
        staging.mkdir()  # with the rights of any new folder, since others may read what is committed
        yield staging
        _commit(staging, target, removing)
        finish_save(target)
    except BaseException:
        _take_back(target)
        _delete_leftovers(target)
        if is_new:
            with suppress(OSError):
                target.rmdir()
        raise


def finish_save(directory: Path) -> None:
    """Move the files of a committed save to where they belong; nothing happens where there is none."""
    manifest = _manifest_of(directory)
    if manifest is None:
        return
    saved, old = directory / SAVED, directory / SAVED / OLD
    old.mkdir(exist_ok=True)
    for name in manifest.written:
        if (saved / name).exists():
            _move(directory / name, old / name)
            os.replace(saved / name, directory / name)
    for name in manifest.removed:
        _move(directory / name, old / name)
    _flush(directory)
    _delete(saved)


def _take_back(directory: Path) -> None:
    """Undo a committed save; until the last step, readers see its files."""
    manifest = _manifest_of(directory)
    if manifest is None:
        return
    saved, old = directory / SAVED, directory / SAVED / OLD
    for name in manifest.written:
        if not (saved / name).exists():
            os.rename(directory / name, saved / name)
    for path in old.iterdir() if old.is_dir() else ():
        os.rename(path, directory / path.name)
    _delete(saved)


def visible_files(directory: Path) -> dict[str, Path]:
    """Name -> path of the files of a directory, those of a committed save before those beside it."""
    manifest = _manifest_of(directory)
    if not directory.is_dir():  # as the hub's client leaves it for an empty repository
        return {}
    found = {path.name: path for path in directory.iterdir() if not path.is_dir()}
    if manifest is None:
        return found
    moved = {name: directory / SAVED / name for name in manifest.written if (directory / SAVED / name).exists()}
    return {name: path for name, path in found.items() if name not in manifest.removed} | moved


def read_unchanged(directory: Path, names: Collection[str], read: Callable[[dict[str, Path]], T]) -> T:
    """What `read` makes of the visible files; it reads again when a save has changed files of these names meanwhile."""
    for _ in range(_ATTEMPTS):
        files = visible_files(directory)
        before, problem = _identities(files, names), None
        try:
            result = read(files)
        except (OSError, ValueError) as error:
            problem = error
        if before is not None and before == _identities(visible_files(directory), names):
            break
    else:
        raise ValueError(f"{directory} is being written all the time; it could not be read.")
    if problem is not None:
        raise problem
    return result


def _identities(files: Mapping[str, Path], names: Collection[str]) -> dict[str, tuple[int, int]] | None:
    """What tells a file from its successor, wherever it moves; None if one moved just now."""
    try:
        stats = {name: os.stat(files[name]) for name in names if name in files}
    except FileNotFoundError:
        return None
    return {name: (found.st_size, found.st_mtime_ns) for name, found in stats.items()}  # inodes change on some file systems


def _commit(staging: Path, target: Path, removing: Collection[str]) -> None:
    written = sorted(os.listdir(staging))
    write_json({"written": written, "removed": sorted(set(removing) - set(written))}, staging / MANIFEST)
    _flush(staging)
    os.rename(staging, target / SAVED)
    _flush(target)


def _manifest_of(directory: Path) -> _Manifest | None:
    """What a committed save has written and removed; None where there is none.

    Raises:
        ValueError: `.saved` is something else, or names files outside of the directory.
    """
    saved = directory / SAVED
    if not saved.exists():
        return None
    try:
        data = read_json(saved / MANIFEST)
    except ValueError as error:
        if not saved.exists():  # a save ended just now
            return None
        raise ValueError(f"{saved} is not what a save leaves there ({error}) Move it away.") from error
    lists = [data.get("written"), data.get("removed")]
    if not all(isinstance(names, list) and all(map(_is_plain, names)) for names in lists):
        raise ValueError(f"{saved / MANIFEST} must list names of files. Move {saved} away.")
    return _Manifest(*lists)  # type: ignore[arg-type]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and not name.startswith(".") and bool(name) and not set(name) & {"/", "\\", "\0", ":"}


def _move(path: Path, destination: Path) -> None:
    if path.is_symlink() or path.exists():
        os.replace(path, destination)


def _delete(folder: Path) -> None:
    """Delete a folder, which is renamed first: nobody who looks at it can take its rest for the whole."""
    doomed = _staging_name(folder.parent)
    with suppress(FileNotFoundError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _delete_leftovers(directory: Path) -> None:
    for leftover in directory.glob(f"{STAGING}*"):
        _delete(leftover)


def _staging_name(directory: Path) -> Path:
    return directory / f"{STAGING}{secrets.token_hex(4)}"


def _flush(directory: Path) -> None:
    """Flush a folder's list of names to the disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
