"""The source distributions of `shadow-peft` on PyPI: downloaded, compared with the hashes below, unpacked.

Their tests and their README are run against this library. Nothing of them is kept in this repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

SHA256 = {
    "0.1.0": "3cc2a24975b31f88b21bb27314852ec764e8dc741781cd9117f48aea85262725",
    "0.1.1": "267f8d95ac8c2b5931bb7b22e8f24ce9b6d98910e67eeb331e6d0789470d7b52",
}


def unpack_sdists(folder: Path) -> dict[str, Path]:
    """Download every version into a folder and unpack it there; version -> the folder of its files."""
    return {version: unpack_sdist(version, folder) for version in SHA256}


def unpack_sdist(version: str, folder: Path) -> Path:
    """Download one version into a folder and unpack it there; the folder of its files.

    Raises:
        ValueError: the package index gave another file than the one that these checks were written for.
    """
    download = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([sys.executable, *download, f"shadow-peft=={version}", "--dest", str(folder)], check=True)
    archive = folder / f"shadow_peft-{version}.tar.gz"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256[version]:
        raise ValueError(f"{archive.name} has the hash {found}, expected {SHA256[version]}.")
    print(f"{archive.name}  sha256 {found}", flush=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder / f"shadow_peft-{version}"
