"""Versions of packages, for what files and cards say of where they come from."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str:
    """The version of an installed package; "unknown" where none is installed, as of a source tree on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Package -> version."""
    return {package: version_of(package) for package in packages}
