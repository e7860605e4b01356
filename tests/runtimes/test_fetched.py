"""Packages that are fetched once: checked by hash, only the named files kept, and no second download."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from shadow_peft.export import fetched
from shadow_peft.export.fetched import Package, fetch, is_fetched
from shadow_peft.export.runtimes import CannotExport


def archive(path: Path, names: tuple[str, ...]) -> str:
    """Writes an archive with files of these names, and gives its integrity."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHADOW_PEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def served(package: Package, source: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets downloads of a package bring an archive; gives the list of downloads."""
    downloads: list[str] = []

    def download(asked: Package, folder: Path) -> Path:
        assert asked == package
        downloads.append(asked.name)
        return source

    monkeypatch.setattr(fetched, "_download", download)
    return downloads


def test_once_and_only_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.tgz"
    integrity = archive(source, ("dist/a.js", "dist/b.js", "../outside", "README.md"))
    package = Package("npm", "@some/package", "1.0.0", integrity, ("dist/a", "LICENSE"))
    downloads = served(package, source, monkeypatch)
    assert not is_fetched(package)
    folder = fetch(package)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["a.js"]
    assert is_fetched(package)
    assert fetch(package) == folder
    assert downloads == ["@some/package"]


def test_another_archive_is_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.tgz"
    integrity = archive(source, ("dist/a.js",))
    archive(source, ("dist/a.js", "dist/more.js"))
    package = Package("npm", "package", "1.0.0", integrity, ("dist/",))
    served(package, source, monkeypatch)
    with pytest.raises(CannotExport, match=r"package 1\.0\.0 is not the archive it was: sha512-"):
        fetch(package)
    assert not is_fetched(package)
    assert list(cache.iterdir()) == []


def test_a_program_that_is_missing_or_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = Package("npm", "package", "1.0.0", "sha512-", ("dist/",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotExport, match="npm is not installed"):
        fetch(package)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no such package' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(CannotExport, match=r"npm cannot fetch package 1\.0\.0: no such package"):
        fetch(package)
