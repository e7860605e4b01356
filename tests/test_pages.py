"""Every snippet of README and docs runs as it stands; see `tests/pages.py`.

Elsewhere: docs/quantized.md (`tests/test_quantized_page.py`), docs/several_adapters.md
(`tests/test_several_adapters_page.py`), docs/serving.md
(`tests/serving/test_page.py`), commands (`tests/cli/test_commands.py`), recipes
(`tests/cli/test_recipes.py`), scripts of `examples` (`tests/test_examples.py`).
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from benchmarks import plots
from tests.pages import PAGES, ROOT, Section, make_place, sections, shell_commands

pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),  # asked by peft and TRL
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),  # a Trainer's default, off without a GPU
]

ONE_AFTER_THE_OTHER = ("docs/quantized.md", "docs/several_adapters.md", "docs/serving.md")
"""Pages whose sections go on with the names of those above, or that need a server; they have tests of their own."""
SECTIONS = [section for page in PAGES for section in sections(page) if not section.name.startswith(ONE_AFTER_THE_OTHER)]
LANGUAGES = {"python", "bash", "bibtex", "text"}


def name_of(section: Section) -> str:
    return section.name


def with_block(language: str) -> list[Section]:
    return [section for section in SECTIONS if section.texts(language)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    make_place(folder)
    return folder


@pytest.fixture
def place(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader works; it has nothing of this repository but the recipes."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_code_is_in_a_language_that_is_run_here() -> None:
    directives = {name for section in SECTIONS for name, _ in section.blocks if name.startswith("{")}
    found = {name for section in SECTIONS for name, _ in section.blocks} - directives
    assert found <= LANGUAGES


@pytest.mark.parametrize("section", with_block("python"), ids=name_of)
def test_the_snippets_of_a_section_run(section: Section, place: Path) -> None:
    if any("from vllm" in text for text in section.texts("python")):
        pytest.importorskip("vllm", reason="vLLM needs an environment of its own, which the page says how to make")
    names: dict[str, Any] = {"__name__": "__main__"}
    for text in section.texts("python"):
        exec(compile(text, section.name, "exec"), names)


# ---------------------------------------------------------------- commands


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of a page, in its order."""
    texts = [text for section in sections(page) for text in section.texts("bash")]
    return [shlex.split(command) for text in texts for command in shell_commands(text)]


COMMANDS = {str(page.relative_to(ROOT)): commands_of(page) for page in PAGES if commands_of(page)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_every_other_command_is_one_that_there_is() -> None:
    """They need an index, an empty environment or minutes: their words are checked, and the rest is done by hand."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page, found in COMMANDS.items():
        for words in found:
            if words[0] == "make":
                assert next(word for word in words[1:] if "=" not in word) in targets, page
            elif words[:2] == ["pip", "install"]:
                extras = re.findall(r"\[(.*)\]", words[-1])
                assert set(",".join(extras).split(",")) - {""} <= set(PROJECT["optional-dependencies"]), page
                assert words[-1].startswith((".", "torch", "dist/shadow_peft-")), f"{page}: not from the index"
            elif words[0].endswith("python") and words[1] == "-m":
                assert find_spec(words[2]) is not None, (page, words)
            elif words[0].endswith("/pip"):  # of the environment of another engine
                assert words[1] in ("install", "uninstall"), (page, words)
            else:
                assert words[0] in ("shadow-peft", "accelerate", "git") or words[:2] == ["pip", "wheel"], (page, words)


def test_the_wheel_has_the_name_that_the_pages_say() -> None:
    for page in PAGES:
        for version in re.findall(r"shadow_peft-(\S+?)-py3-none-any\.whl", page.read_text(encoding="utf-8")):
            assert version == PROJECT["version"], page


# ---------------------------------------------------------------- what else is said


def svg_text(path: Path) -> list[str]:
    return [text.strip() for text in ElementTree.parse(path).getroot().itertext() if text.strip()]


def test_badges_and_citation_say_what_the_project_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"!\[([^]]*)\]\((docs/badges/\w+\.svg)\)", readme)
    said = dict(name.split(": ") for name, _ in found)
    requirement = next(line for line in PROJECT["dependencies"] if line.startswith("transformers"))
    assert said == {
        "license": PROJECT["license"],
        "python": f"{PROJECT['requires-python'].removeprefix('>=')} or later",
        "transformers": f"{re.findall('>=([0-9.]+)', requirement)[0]} or later",
        "arXiv": "2604.19254",
    }
    for name, path in found:
        title, *both = svg_text(ROOT / path)
        assert title == name == ": ".join(both)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    paper = citation["preferred-citation"]
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for cited in (names, paper["url"], paper["journal"], paper["title"].removeprefix("ShadowPEFT")):
        assert cited in readme


def test_the_pictures_show_the_committed_results(tmp_path: Path) -> None:
    for draw, name in ((plots.draw_quality, "quality.svg"), (plots.draw_speed, "speed.svg")):
        draw(tmp_path / name)
        assert svg_text(tmp_path / name) == svg_text(ROOT / "docs" / name), "run: python -m benchmarks.plots"


def test_the_pictures_have_the_figures_of_the_pages() -> None:
    quality = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    means = quality.partition("### Mean over")[2].partition("###")[0]
    for method, bar, exact in zip(plots.METHODS, plots.quality_bars("loss"), plots.quality_bars("exact"), strict=True):
        second = "-" if bar.second is None else f"{bar.second:.3f}"
        assert f"| {method} | {bar.value:.3f} | {exact.value:.3f} | {second} |" in means
    speed = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    for name, bar in zip(plots.TRAINING, plots.training_bars("peak"), strict=True):
        assert re.search(rf"^\| {re.escape(name)} \|.*\({bar.value:.2f}\)", speed, re.MULTILINE)
