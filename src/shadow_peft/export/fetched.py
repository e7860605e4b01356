"""Packages that an export takes files out of without installing them: fetched once, checked, kept in the user's cache.

They come from the registry that pip or npm is configured for. The folder is `$SHADOW_PEFT_CACHE`, or `shadow_peft` in the
user's cache folder.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shadow_peft.export.runtimes import CannotExport


@dataclass(frozen=True)
class Package:
    """An archive in a registry.

    Attributes:
        registry: pip or npm.
        name, version: of the package.
        integrity: `sha256-` or `sha512-` and the digest in base64, as npm writes it.
        files: beginnings of the names in the archive that are kept, below its first folder.
    """

    registry: Literal["pip", "npm"]
    name: str
    version: str
    integrity: str
    files: tuple[str, ...]


def cache_folder() -> Path:
    """Where packages are kept."""
    named = os.environ.get("SHADOW_PEFT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "shadow_peft")


def is_fetched(package: Package) -> bool:
    """Whether `fetch` needs no network."""
    return _place(package).is_dir()


def fetch(package: Package) -> Path:
    """The folder that holds the kept files of a package.

    Raises:
        CannotExport: it cannot be fetched, or its archive is another one.
    """
    place = _place(package)
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as name:
        archive = _download(package, Path(name))
        _check(archive, package)
        unpacked = Path(name, "unpacked")
        _unpack(archive, package.files, unpacked)
        try:
            os.rename(unpacked, place)
        except OSError:  # another process was first
            if not place.is_dir():
                raise
    return place


def _place(package: Package) -> Path:
    digest = hashlib.sha256(repr(package).encode()).hexdigest()[:12]
    return cache_folder() / f"{package.name.replace('/', '-').lstrip('@')}-{package.version}-{digest}"


def _download(package: Package, folder: Path) -> Path:
    if package.registry == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", package.name, f"{package.name}=={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise CannotExport(f"npm is not installed, which fetches {package.name} {package.version} once")
        command = [npm, "pack", "--silent", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    archives = [path for path in folder.iterdir() if path.name.endswith((".tgz", ".tar.gz"))]
    if done.returncode or len(archives) != 1:
        said = (done.stderr.strip().splitlines() or ["it wrote no archive"])[-1]
        raise CannotExport(f"{package.registry} cannot fetch {package.name} {package.version}: {said}")
    return archives[0]


def _check(archive: Path, package: Package) -> None:
    algorithm, _, expected = package.integrity.partition("-")
    with archive.open("rb") as file:
        digest = base64.b64encode(hashlib.file_digest(file, algorithm).digest()).decode()
    if digest != expected:
        raise CannotExport(f"{package.name} {package.version} is not the archive it was: {algorithm}-{digest}")


def _unpack(archive: Path, files: tuple[str, ...], target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            below = member.name.partition("/")[2]
            if member.isfile() and below.startswith(files):
                tar.extract(member, target, filter="data")
    if not target.is_dir():
        raise CannotExport(f"{archive.name} has none of {', '.join(files)}")
