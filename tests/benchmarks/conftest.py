"""A tiny base and tiny tasks in place of what is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality.real import measures, toy


@pytest.fixture(scope="session")
def toy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for SHADOW_BENCHMARK_CACHE."""
    return toy.make(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def toy_base(toy_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The harness reads the toy in this test, and decodes little."""
    monkeypatch.setenv("SHADOW_BENCHMARK_CACHE", str(toy_cache))
    for name, value in {"PROMPTS": 1, "MOST_TOKENS": 5, "REPEATS": 1}.items():
        monkeypatch.setattr(measures, name, value)
    return toy_cache
