"""Every notebook of `examples/notebooks` runs on small stand-ins, and its `.ipynb` is its Markdown, executed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed")
pytest.importorskip("nbmake", reason="nbmake is not installed")

from scripts.execute_notebooks import NOTEBOOKS, names, unexecuted  # noqa: E402

NAMES = [
    "classification_playground",
    "different_llm_backbones_playground",
    "pretraining_shadow_via_pseudo_inverse",
    "robot_intent_playground",
]


def test_the_notebooks_are_those_of_the_package_page() -> None:
    assert names() == NAMES
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_in_small(name: str, tmp_path: Path) -> None:
    """In a folder of its own, without network, by nbmake in a process of its own."""
    (tmp_path / f"{name}.ipynb").write_bytes((NOTEBOOKS / f"{name}.ipynb").read_bytes())
    small = {**os.environ, "SHADOW_PEFT_SMALL": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--nbmake", "--nbmake-timeout=300", f"{name}.ipynb"]
    run = subprocess.run(command, cwd=tmp_path, env=small, capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"\n{run.stdout[-6000:]}\n{run.stderr[-1000:]}"
    assert "1 passed" in run.stdout


@pytest.mark.parametrize("name", NAMES)
def test_the_executed_notebook_is_its_markdown(name: str) -> None:
    executed = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    written = unexecuted(name)
    assert [c.source for c in executed.cells] == [c.source for c in written.cells], "run: make notebooks"
    assert [c.id for c in executed.cells] == [c.id for c in written.cells]


@pytest.mark.parametrize("name", NAMES)
def test_the_executed_notebook_has_run_from_top_to_bottom_without_a_complaint(name: str) -> None:
    cells = [cell for cell in jupytext.read(NOTEBOOKS / f"{name}.ipynb").cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 6
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "/tmp" not in str(outputs), "a path of the machine that executed it"


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_says_where_it_opens_and_what_it_needs(name: str) -> None:
    top = jupytext.read(NOTEBOOKS / f"{name}.md").cells[0].source
    for word in ("**Opens in**", "**Needs**", "**Network**", "**Takes**"):
        assert word in top
