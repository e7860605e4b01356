"""Skips, saying why, where a runtime cannot be used: a package is missing, or its files were not fetched yet."""

from __future__ import annotations

import shutil

import pytest

from shadow_peft.export import gguf, html
from shadow_peft.export.fetched import is_fetched
from shadow_peft.export.runtimes import RUNTIMES, CannotExport, require


def cannot_use(name: str) -> str | None:
    """Why a format cannot be written and run here; None where it can."""
    if name == "hf":
        return None
    try:
        require(name, (*RUNTIMES[name].to_write, *RUNTIMES[name].to_run))
    except CannotExport as error:
        return str(error)
    packages = {"gguf": [gguf.SOURCES], "html": list(html.packages().values())}.get(name, [])
    missing = [package.name for package in packages if not is_fetched(package)]
    if missing:
        return f"{', '.join(missing)} not fetched: python -m shadow_peft.export.fetch_all"
    if name == "html" and not any(map(shutil.which, html.BROWSERS)):
        return "no Chromium: apt-get install chromium"
    return None


def need(name: str) -> None:
    """Skip where a format cannot be written and run."""
    reason = cannot_use(name)
    if reason is not None:
        pytest.skip(reason)
